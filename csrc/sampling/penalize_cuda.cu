#include <cuda_runtime.h>

#include "device/dependent.cuh"
#include "fastgpt/check.h"
#include "sampling/kernels.h"

namespace fastgpt::sampling {
namespace {

constexpr int kThreads = 256;
constexpr std::uint32_t kCountMask = 0x7FFFFFFFU;
constexpr std::uint32_t kInPrompt = 0x80000000U;

struct PenalizeArgs {
  float* logits;
  std::int64_t logits_stride;
  const std::uint32_t* history;
  std::int64_t history_stride;
  std::int64_t num_slots;
  const std::int64_t* slots;
  const float* repetition;
  const float* presence;
  const float* frequency;
  std::int64_t vocab_size;
};

// One thread adjusts every gridDim.x * kThreads-th logit of one row; a row without penalties costs
// one launch of CTAs that leave at once. Most words are 0 and their logits are not even read.
// Grid: (chunks of the vocabulary, num_rows). A slot past the history is skipped.
__global__ void __launch_bounds__(kThreads)
    penalize_kernel(const __grid_constant__ device::Dependent<PenalizeArgs> dependent) {
  const PenalizeArgs& args = dependent.wait();
  const std::int64_t row = blockIdx.y;
  const std::int64_t slot = args.slots[row];
  const float repetition = args.repetition[row];
  const float presence = args.presence[row];
  const float frequency = args.frequency[row];
  if (slot < 0 || slot >= args.num_slots) return;
  if (repetition == 1.0F && presence == 0.0F && frequency == 0.0F) return;
  float* logits = args.logits + row * args.logits_stride;
  const std::uint32_t* history = args.history + slot * args.history_stride;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.vocab_size;
       i += std::int64_t(gridDim.x) * kThreads) {
    const std::uint32_t word = history[i];
    if (word == 0) continue;
    const float old = logits[i];
    float logit = old > 0.0F ? old / repetition : old * repetition;
    if (const std::uint32_t count = word & kCountMask; count > 0) {
      logit = fmaf(-frequency, float(count), logit);
      logit -= presence;
    }
    logits[i] = logit;
  }
}

struct RecordArgs {
  std::uint32_t* history;
  std::int64_t history_stride;
  std::int64_t num_slots;
  std::int64_t vocab_size;
  const std::int64_t* slots;
  const std::int64_t* ids;
  std::int64_t num_ids;
  bool is_prompt;
};

// One thread enters one token. Atomics, because one call may name a (slot, id) pair twice.
// Grid: ceil(num_ids / kThreads). Slots and ids outside the history are skipped.
__global__ void __launch_bounds__(kThreads)
    record_tokens_kernel(const __grid_constant__ device::Dependent<RecordArgs> dependent) {
  const RecordArgs& args = dependent.wait();
  const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.num_ids) return;
  const std::int64_t slot = args.slots[i];
  const std::int64_t id = args.ids[i];
  if (slot < 0 || slot >= args.num_slots || id < 0 || id >= args.vocab_size) return;
  std::uint32_t* word = args.history + slot * args.history_stride + id;
  if (args.is_prompt) {
    atomicOr(word, kInPrompt);
  } else {
    atomicAdd(word, 1U);
  }
}

}  // namespace

void penalize_cuda(const PenalizeParams& p, const Stream& stream) {
  const PenalizeArgs args{
      p.logits.as<float>(),     p.logits.stride(0),     p.history.as<std::uint32_t>(),
      p.history.stride(0),      p.history.size(0),      p.slots.as<std::int64_t>(),
      p.repetition.as<float>(), p.presence.as<float>(), p.frequency.as<float>(),
      p.logits.size(1)};
  FASTGPT_CHECK(p.logits.size(0) <= 65535, "logits has ", p.logits.size(0),
                " rows; expected at most 65535");
  const std::int64_t chunks = (p.logits.size(1) + 4 * kThreads - 1) / (4 * kThreads);
  const dim3 grid(unsigned(chunks < 1024 ? chunks : 1024), unsigned(p.logits.size(0)));
  device::launch(penalize_kernel, grid, kThreads, 0, static_cast<cudaStream_t>(stream.handle),
                 args);
}

void record_tokens_cuda(const RecordTokensParams& p, const Stream& stream) {
  const std::int64_t num_ids = p.ids.size(0);
  const RecordArgs args{
      p.history.as<std::uint32_t>(), p.history.stride(0),      p.history.size(0), p.history.size(1),
      p.slots.as<std::int64_t>(),    p.ids.as<std::int64_t>(), num_ids,           p.is_prompt};
  device::launch(record_tokens_kernel, unsigned((num_ids + kThreads - 1) / kThreads), kThreads, 0,
                 static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace fastgpt::sampling
