// Comparing floats as integers: one max then finds the largest value and the lowest index of it.
#pragma once
#include <cstdint>

namespace fastgpt::device {

/// Integer with the order of floats: a < b <=> ordered_bits(a) < ordered_bits(b). -0 equals +0; NaN
/// is below everything.
__device__ inline std::uint32_t ordered_bits(float value) {
  if (value != value) return 0;
  const std::uint32_t bits = __float_as_uint(value + 0.0F);
  return bits & 0x80000000U ? ~bits : bits | 0x80000000U;
}

/// Key of (value, index): larger for a larger value, then for a lower index. Never 0.
__device__ inline std::uint64_t order_key(float value, std::uint32_t index) {
  return std::uint64_t(ordered_bits(value)) << 32 | (~index);
}

__device__ inline std::uint32_t key_index(std::uint64_t key) { return ~std::uint32_t(key); }

__device__ inline std::uint64_t warp_max(std::uint64_t value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const std::uint64_t other = __shfl_xor_sync(~0U, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace fastgpt::device
