#include <limits>

#include "sampling/draw.h"
#include "sampling/weigh.h"

namespace fastgpt::sampling {
namespace {

float largest_of_run(const float* logits, std::int64_t count) {
  float largest = -std::numeric_limits<float>::infinity();
  for (std::int64_t i = 0; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
  return largest;
}

std::uint64_t weigh_run(const float* logits, std::int64_t count, const Weighing& w,
                        std::uint32_t* weights) {
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < kRun; ++i) {
    weights[i] = 0;
    if (i >= count || !(logits[i] >= w.threshold)) continue;
    const float e = exp2_of((logits[i] - w.largest) * w.factor);
    if (e >= w.min_p) weights[i] = token_weight(e);
    sum += weights[i];
  }
  return sum;
}

}  // namespace

const Runs kRunsPortable{&largest_of_run, &weigh_run};

}  // namespace fastgpt::sampling
