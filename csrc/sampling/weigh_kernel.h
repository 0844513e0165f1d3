// The vector form of exp2_of() and token_weight(): the same operations in the same order, so the
// same bits. Included by weigh_avx2.cpp and weigh_avx512.cpp, which have the fused multiply-add.
#pragma once
#include "fastgpt/simd.h"
#include "sampling/weigh.h"

namespace fastgpt::sampling {
namespace {

using namespace simd;

constexpr float kNever = -__builtin_inff();

// Logits past the end read as NaN, which never wins and weighs nothing.
inline const float* filled(const float* logits, std::int64_t count, float* buffer) {
  if (count == kRun) return logits;
  for (std::int64_t i = 0; i < kRun; ++i) buffer[i] = i < count ? logits[i] : __builtin_nanf("");
  return buffer;
}

float largest_of_run(const float* logits, std::int64_t count) {
  float buffer[kRun];
  logits = filled(logits, count, buffer);
  Vec largest = set1(kNever);
  for (int i = 0; i < kRun; i += kWidth) largest = max(load(logits + i), largest);
  return max_of(largest);
}

std::uint64_t weigh_run(const float* logits, std::int64_t count, const Weighing& w,
                        std::uint32_t* weights) {
  float buffer[kRun];
  logits = filled(logits, count, buffer);
  std::uint64_t sum = 0;
  for (int i = 0; i < kRun; i += kWidth) {
    const Vec logit = load(logits + i);
    const Vec y = (logit - set1(w.largest)) * set1(w.factor);
    const Vec lowest = set1(-64.0F);
    const Vec bounded = max(y, lowest);
    const Vec whole = round(bounded);
    const Vec f = bounded - whole;
    Vec p = set1(1.535336188319500e-4F);
    p = fma(p, f, set1(1.339887440266574e-3F));
    p = fma(p, f, set1(9.618437357674640e-3F));
    p = fma(p, f, set1(5.550332471162809e-2F));
    p = fma(p, f, set1(2.402264791363012e-1F));
    p = fma(p, f, set1(6.931472028550421e-1F));
    p = fma(p, f, set1(1.0F));
    Vec e = keep_if_at_least(p * power_of_two(whole), y, lowest);
    e = keep_if_at_least(e, e, set1(w.min_p));
    e = keep_if_at_least(e, logit, set1(w.threshold));
    sum += store_integers(weights + i, e * set1(1073741824.0F));
  }
  return sum;
}

constexpr Runs kTable{&largest_of_run, &weigh_run};

}  // namespace
}  // namespace fastgpt::sampling
