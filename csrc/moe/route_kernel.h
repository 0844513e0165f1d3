// The loops over the experts of a token, included by one route_<isa>.cpp each.
#pragma once
#include "fastgpt/simd.h"
#include "moe/route.h"

namespace fastgpt::moe {
namespace {

using namespace simd;

constexpr float kLog2E = 1.44269504F;
constexpr float kLowest = -__builtin_inff();

float largest_of(const float* values, std::int64_t n) {
  Vec largest = set1(kLowest);
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) largest = max(largest, load(values + i));
  float result = max_of(largest);
  for (; i < n; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

void score(const float* logits, std::int64_t num_experts, bool is_sigmoid, float* score) {
  if (is_sigmoid) {
    for_each_run(num_experts, [&](std::int64_t i, int n) {
      const Vec x = load_run(logits + i, n);
      store_run(score + i, set1(1.0F) / (set1(1.0F) + exp2(x * set1(-kLog2E))), n);
    });
    return;
  }
  const float largest = largest_of(logits, num_experts);
  float total = 0.0F;
  for_each_run(num_experts, [&](std::int64_t i, int n) {
    const Vec e = exp2((load_run(logits + i, n) - set1(largest)) * set1(kLog2E));
    store_run(score + i, e, n);
    for (int j = 0; j < n; ++j) total += score[i + j];
  });
  for_each_run(num_experts, [&](std::int64_t i, int n) {
    store_run(score + i, load_run(score + i, n) / set1(total), n);
  });
}

std::int64_t first_largest(const float* values, std::int64_t num_values) {
  const float largest = largest_of(values, num_values);
  std::int64_t i = 0;
  while (i + kWidth <= num_values && max_of(load(values + i)) != largest) i += kWidth;
  while (values[i] != largest) ++i;
  return i;
}

constexpr RouteLoops kLoops{&score, &first_largest};

}  // namespace
}  // namespace fastgpt::moe
