// The row functions, included by one rows_<isa>.cpp each.
#pragma once
#include "fastgpt/simd.h"
#include "norm/rows.h"

namespace fastgpt::norm {
namespace {

using namespace simd;

// 1 / sqrt(mean square + eps): every row sums in the same order, four runs of lanes at a time.
template <class T>
float inverse_rms(const T* x, std::int64_t hidden, float eps) {
  Vec sums[4] = {set1(0.0F), set1(0.0F), set1(0.0F), set1(0.0F)};
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= hidden; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) {
      const Vec value = load(x + i + j * kWidth);
      sums[j] = fma(value, value, sums[j]);
    }
  }
  for_each_run(hidden - i, [&](std::int64_t k, int n) {
    const Vec value = load_run(x + i + k, n);
    sums[0] = fma(value, value, sums[0]);
  });
  const float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.0F / __builtin_sqrtf(sum / float(hidden) + eps);
}

template <class R, class W, class T>
void scale_row(const R* x, float factor, const W* weight, T* out, std::int64_t hidden) {
  for_each_run(hidden, [&](std::int64_t i, int n) {
    Vec value = load_run(x + i, n) * set1(factor);
    if (weight != nullptr) value = value * load_run(weight + i, n);
    store_run(out + i, value, n);
  });
}

void rms_norm_row(const void* x, DType dtype, const void* weight, DType weight_dtype, void* out,
                  std::int64_t hidden, float eps) {
  with_float(dtype, [&](auto tag) {
    with_float(weight_dtype, [&](auto weight_tag) {
      using T = decltype(tag);
      using W = decltype(weight_tag);
      const T* row = static_cast<const T*>(x);
      scale_row(row, inverse_rms(row, hidden, eps), static_cast<const W*>(weight),
                static_cast<T*>(out), hidden);
    });
  });
}

void add_rms_norm_row(const void* x, DType dtype, void* residual, DType residual_dtype,
                      const void* weight, DType weight_dtype, void* out, std::int64_t hidden,
                      float eps) {
  with_float(dtype, [&](auto tag) {
    with_float(residual_dtype, [&](auto residual_tag) {
      using T = decltype(tag);
      using R = decltype(residual_tag);
      R* sum = static_cast<R*>(residual);
      for_each_run(hidden, [&](std::int64_t i, int n) {
        store_run(sum + i, load_run(sum + i, n) + load_run(static_cast<const T*>(x) + i, n), n);
      });
      const float factor = inverse_rms(sum, hidden, eps);
      with_float(weight_dtype, [&](auto weight_tag) {
        using W = decltype(weight_tag);
        scale_row(sum, factor, static_cast<const W*>(weight), static_cast<T*>(out), hidden);
      });
    });
  });
}

// Pairs (2i, 2i + 1) pass through a buffer where they stand apart, kChunk pairs at a time.
template <class T>
void rotate_interleaved(T* x, const float* cos, const float* sin, std::int64_t half) {
  constexpr std::int64_t kChunk = 128;
  float values[2 * kChunk];
  for (std::int64_t first = 0; first < half; first += kChunk) {
    const std::int64_t count = half - first < kChunk ? half - first : kChunk;
    T* pairs = x + 2 * first;
    for_each_run(2 * count,
                 [&](std::int64_t i, int n) { store_run(values + i, load_run(pairs + i, n), n); });
    for (std::int64_t i = 0; i < count; ++i) {
      const float a = values[2 * i];
      const float b = values[2 * i + 1];
      values[2 * i] = a * cos[first + i] - b * sin[first + i];
      values[2 * i + 1] = b * cos[first + i] + a * sin[first + i];
    }
    for_each_run(2 * count,
                 [&](std::int64_t i, int n) { store_run(pairs + i, load_run(values + i, n), n); });
  }
}

void rotate_head(void* head, DType dtype, const float* cos, const float* sin, std::int64_t half,
                 bool interleaved) {
  with_float(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* x = static_cast<T*>(head);
    if (interleaved) return rotate_interleaved(x, cos, sin, half);
    for_each_run(half, [&](std::int64_t i, int n) {
      const Vec a = load_run(x + i, n);
      const Vec b = load_run(x + half + i, n);
      const Vec c = load_run(cos + i, n);
      const Vec s = load_run(sin + i, n);
      store_run(x + i, a * c - b * s, n);
      store_run(x + half + i, b * c + a * s, n);
    });
  });
}

void silu_mul_row(const void* gate, const void* up, DType dtype, void* out, std::int64_t width) {
  with_float(dtype, [&](auto tag) {
    using T = decltype(tag);
    for_each_run(width, [&](std::int64_t i, int n) {
      const Vec g = load_run(static_cast<const T*>(gate) + i, n);
      const Vec u = load_run(static_cast<const T*>(up) + i, n);
      store_run(static_cast<T*>(out) + i, silu(g) * u, n);
    });
  });
}

constexpr Rows kTable{&rms_norm_row, &add_rms_norm_row, &rotate_head, &silu_mul_row};

}  // namespace
}  // namespace fastgpt::norm
