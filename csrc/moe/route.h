// The two loops over all experts of a token, one pair of functions per instruction set.
#pragma once
#include <cstdint>

namespace fastgpt::moe {

struct RouteLoops {
  /// score[e] = sigmoid(logits[e]), or the softmax over all.
  void (*score)(const float* logits, std::int64_t num_experts, bool is_sigmoid, float* score);
  /// Index of the largest value, the lowest among equals. No value is NaN; num_values > 0.
  std::int64_t (*first_largest)(const float* values, std::int64_t num_values);
};
extern const RouteLoops kRouteLoopsPortable;
extern const RouteLoops kRouteLoopsAvx2;
extern const RouteLoops kRouteLoopsAvx512;

}  // namespace fastgpt::moe
