// Rotary embedding of one pair of columns, the same bits in every kernel that does it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastgpt::device {

/// Rows of [num_positions, 2 * num_pairs]: cosines, then sines.
struct AngleTable {
  const float* cos_sin;
  std::int64_t stride;
  std::int64_t num_positions;
  int num_pairs;
};

/// The pair (a, b) turned by its position's angle; NaN for a position outside the table.
__device__ inline float2 rotate_pair(const AngleTable& table, std::int64_t position, int pair,
                                     float a, float b) {
  float cosine = __int_as_float(0x7FC00000);
  float sine = cosine;
  if (position >= 0 && position < table.num_positions) {
    cosine = table.cos_sin[position * table.stride + pair];
    sine = table.cos_sin[position * table.stride + table.num_pairs + pair];
  }
  // Spelled out, because the compiler may contract either product.
  return {fmaf(a, cosine, -__fmul_rn(b, sine)), fmaf(b, cosine, __fmul_rn(a, sine))};
}

}  // namespace fastgpt::device
