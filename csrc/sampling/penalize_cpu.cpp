#include <algorithm>
#include <cmath>

#include "fastgpt/check.h"
#include "fastgpt/thread_pool.h"
#include "sampling/kernels.h"

namespace fastgpt::sampling {
namespace {

constexpr std::uint32_t kCountMask = 0x7FFFFFFFU;
constexpr std::uint32_t kInPrompt = 0x80000000U;

void check_slots(const TensorView& slots, std::int64_t num_slots) {
  for (std::int64_t i = 0; i < slots.size(0); ++i) {
    const std::int64_t slot = slots.as<std::int64_t>()[i];
    FASTGPT_CHECK(slot < num_slots, "slots[", i, "] is ", slot, "; the history has ", num_slots,
                  " slots");
  }
}

void penalize_range(const PenalizeParams& p, std::int64_t row, std::int64_t first,
                    std::int64_t last) {
  const std::int64_t slot = p.slots.as<std::int64_t>()[row];
  const float repetition = p.repetition.as<float>()[row];
  const float presence = p.presence.as<float>()[row];
  const float frequency = p.frequency.as<float>()[row];
  if (slot < 0 || (repetition == 1.0F && presence == 0.0F && frequency == 0.0F)) return;
  float* logits = p.logits.as<float>() + row * p.logits.stride(0);
  const std::uint32_t* history = p.history.as<std::uint32_t>() + slot * p.history.stride(0);
  for (std::int64_t i = first; i < last; ++i) {
    if (history[i] == 0) continue;  // most tokens were never seen
    float logit = logits[i] > 0.0F ? logits[i] / repetition : logits[i] * repetition;
    if (const std::uint32_t count = history[i] & kCountMask; count > 0) {
      logit = std::fma(-frequency, float(count), logit);
      logit -= presence;
    }
    logits[i] = logit;
  }
}

}  // namespace

void penalize_cpu(const PenalizeParams& p) {
  check_slots(p.slots, p.history.size(0));
  for (std::int64_t i = 0; i < p.logits.size(0); ++i) {
    const float repetition = p.repetition.as<float>()[i];
    FASTGPT_CHECK(repetition > 0.0F, "repetition[", i, "] is ", repetition,
                  "; expected more than 0 (1 = off)");
  }
  const std::int64_t vocab_size = p.logits.size(1);
  parallel_for(0, p.logits.size(0) * vocab_size, 65536, [&](std::int64_t a, std::int64_t b) {
    while (a < b) {
      const std::int64_t row = a / vocab_size;
      const std::int64_t end = std::min(b, (row + 1) * vocab_size);
      penalize_range(p, row, a - row * vocab_size, end - row * vocab_size);
      a = end;
    }
  });
}

void record_tokens_cpu(const RecordTokensParams& p) {
  check_slots(p.slots, p.history.size(0));
  const std::int64_t* slots = p.slots.as<std::int64_t>();
  const std::int64_t* ids = p.ids.as<std::int64_t>();
  for (std::int64_t i = 0; i < p.ids.size(0); ++i) {
    FASTGPT_CHECK(slots[i] < 0 || (ids[i] >= 0 && ids[i] < p.history.size(1)), "ids[", i, "] is ",
                  ids[i], "; the vocabulary has ", p.history.size(1), " tokens");
  }
  for (std::int64_t i = 0; i < p.ids.size(0); ++i) {
    if (slots[i] < 0) continue;
    std::uint32_t& word = p.history.as<std::uint32_t>()[slots[i] * p.history.stride(0) + ids[i]];
    word = p.is_prompt ? word | kInPrompt : word + 1;
  }
}

}  // namespace fastgpt::sampling
