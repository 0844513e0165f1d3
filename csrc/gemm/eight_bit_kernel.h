// int8 rows times int8 weights, written once. Included by exactly one eight_bit_<isa>.cpp each,
// after it defined Dot: everything is in an unnamed namespace, as in panel_kernel.h.
//
// Sums of products of codes are exact int32, so the bits of out do not depend on the instruction
// set, on the number of rows or on threads. One lane is one output column.
#pragma once
#include <emmintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "fastgpt/dispatch.h"
#include "gemm/cpu_layout.h"
#include "gemm/eight_bit_panel.h"

namespace fastgpt::gemm {
namespace {

constexpr int kQuantum = 64;  // values converted together, so that loops have a fixed length

/// Values first .. first + 63 of a row in float32; zeros behind `end`.
template <class T>
void load_values(const T* x, std::int64_t first, std::int64_t end, float* values) {
  const std::int64_t count = std::clamp<std::int64_t>(end - first, 0, kQuantum);
  if (count == kQuantum) {
    for (int i = 0; i < kQuantum; ++i) values[i] = to_float(x[first + i]);
    return;
  }
  for (int i = 0; i < kQuantum; ++i) values[i] = i < count ? to_float(x[first + i]) : 0.0F;
}

/// 16 products, rounded to nearest even, as bytes: every four in the order 0 2 1 3. Written out in
/// what every x86-64 has: a compiler may fuse a product with the addition that would round it.
void store_codes(const float* values, float inverse, std::int8_t* codes) {
  const __m128 factor = _mm_set1_ps(inverse);
  const auto four = [&](int i) {
    const __m128i rounded = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(values + 4 * i), factor));
    return _mm_shuffle_epi32(rounded, _MM_SHUFFLE(3, 1, 2, 0));
  };
  const __m128i low = _mm_packs_epi32(four(0), four(1)), high = _mm_packs_epi32(four(2), four(3));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm_packs_epi16(low, high));
}

template <class T>
void quantize_row(const QuantizeRowTask& t) {
  const T* x = static_cast<const T*>(t.x);
  const std::int64_t width = (t.k + 127) / 128 * 128;
  float values[kQuantum];
  for (std::int64_t begin = 0, g = 0; begin < width; begin += t.group, ++g) {
    const std::int64_t end = std::min(begin + t.group, t.k);
    const std::int64_t padded = std::min(begin + t.group, width);
    // Magnitudes are ordered as their bits are, infinity and NaN above all numbers.
    std::uint32_t most[kQuantum] = {};
    for (std::int64_t i = begin; i < end; i += kQuantum) {
      load_values(x, i, end, values);
      for (int j = 0; j < kQuantum; ++j) {
        most[j] = std::max(most[j], std::bit_cast<std::uint32_t>(values[j]) & 0x7FFFFFFFU);
      }
    }
    const float amax = std::bit_cast<float>(*std::max_element(most, most + kQuantum));
    const bool finite = amax <= std::numeric_limits<float>::max();
    const float scale =
        finite ? std::max(amax / 127.0F, 0x1p-100F) : std::numeric_limits<float>::quiet_NaN();
    t.scale[g * t.stride] = scale;
    if (!finite) {
      std::memset(t.codes + begin, 0, std::size_t(padded - begin));
      continue;
    }
    const float inverse = 1.0F / scale;
    for (std::int64_t i = begin; i < padded; i += kQuantum) {
      load_values(x, i, end, values);
      for (int j = 0; j < kQuantum; j += 16) store_codes(values + j, inverse, t.codes + i + j);
    }
  }
}

void quantize_int8(const QuantizeRowTask& t) {
  dispatch_float(t.x_dtype, [&](auto tag) { quantize_row<decltype(tag)>(t); });
}

/// Scale, add the bias, round once: 16 columns of one row.
void store_sums(const EightBitTask& t, std::int64_t row, std::int64_t column,
                const std::int32_t* sums) {
  const int count = int(std::min<std::int64_t>(16, t.n - column));
  const std::int32_t excess = Dot::kExcess * t.row_sums[row];
  float values[16];
  for (int i = 0; i < count; ++i) {
    // Wraps around where the excess did.
    const auto exact = std::int32_t(std::uint32_t(sums[i]) - std::uint32_t(excess));
    values[i] = float(exact) * (t.row_scale[row] * t.channel_scale[column + i]);
    if (t.bias != nullptr) values[i] += t.bias[column + i];
  }
  dispatch_float(t.out_dtype, [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(t.out) + row * t.out_stride + column;
    for (int i = 0; i < count; ++i) out[i] = from_float<T>(values[i]);
  });
}

/// kRows rows of one block of 64 columns.
template <int kRows>
void multiply_rows(const EightBitTask& t, std::int64_t row, std::int64_t block) {
  constexpr std::int64_t kStepBytes = kStep * kBlockColumns;
  const std::int8_t* const weight = t.weight + block * t.steps * kStepBytes;
  const std::int8_t* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = t.codes + (row + r) * t.codes_stride;
  for (int panel = 0; panel < kPanels; panel += Dot::kPanelsAtOnce) {
    alignas(64) std::int32_t sums[kRows][Dot::kPanelsAtOnce][16];
    Dot::add_up<kRows>(x, weight + panel * kStep * kPanelColumns, t.steps, kStepBytes, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < Dot::kPanelsAtOnce; ++p) {
        const std::int64_t column = block * kBlockColumns + (panel + p) * kPanelColumns;
        if (column < t.n) store_sums(t, row + r, column, sums[r][p]);
      }
    }
  }
}

/// The last rows, kMost at most.
template <int kMost>
void multiply_rest(const EightBitTask& t, std::int64_t row, std::int64_t block) {
  if constexpr (kMost > 0) {
    if (t.num_rows - row == kMost) return multiply_rows<kMost>(t, row, block);
    multiply_rest<kMost - 1>(t, row, block);
  }
}

void multiply(const EightBitTask& t) {
  for (std::int64_t block = t.block_begin; block < t.block_end; ++block) {
    std::int64_t row = 0;
    for (; row + Dot::kRows <= t.num_rows; row += Dot::kRows) {
      multiply_rows<Dot::kRows>(t, row, block);
    }
    multiply_rest<Dot::kRows - 1>(t, row, block);
  }
}

}  // namespace
}  // namespace fastgpt::gemm
