// Turning a run of logits into integer weights (fastgpt/sampling.h), per instruction set.
#pragma once
#include <cstdint>

namespace fastgpt::sampling {

constexpr std::int64_t kRun = 64;  // logits whose largest value and weight are kept together

/// What a row's weights depend on.
struct Weighing {
  float largest;    // the row's largest logit
  float factor;     // c of the definition
  float threshold;  // a smaller logit weighs nothing
  float min_p;      // so does a smaller exp2(y)
};

struct Runs {
  /// Largest of the count <= kRun logits, NaN left out; -inf if none is left.
  float (*largest)(const float* logits, std::int64_t count);
  /// Write the weights of count <= kRun logits to weights [kRun] and return their sum.
  std::uint64_t (*weigh)(const float* logits, std::int64_t count, const Weighing& weighing,
                         std::uint32_t* weights);
};

extern const Runs kRunsPortable;
extern const Runs kRunsAvx2;
extern const Runs kRunsAvx512;

}  // namespace fastgpt::sampling
