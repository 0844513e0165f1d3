// Loads of several values by one thread.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "device/types.cuh"

namespace fastgpt::device {

/// 16 bytes, kept in L1. A plain load: __ldg could pass the wait of a dependent kernel.
__device__ inline uint4 load_16(const void* pointer) { return *static_cast<const uint4*>(pointer); }

/// Eight 16-bit values of a row, zero at and behind column `end`; `aligned` says that vector loads
/// are legal at multiples of eight.
template <class T>
__device__ inline uint4 load_8(const T* row, std::int64_t column, std::int64_t end, bool aligned) {
  static_assert(sizeof(T) == 2);
  if (aligned && column + 8 <= end) return load_16(row + column);
  uint4 packed = {0, 0, 0, 0};
  if (column < end) {
    std::uint32_t words[4] = {0, 0, 0, 0};
    const auto* bits = reinterpret_cast<const std::uint16_t*>(row + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < end) words[i / 2] |= std::uint32_t(bits[i]) << (16 * (i % 2));
    }
    packed = {words[0], words[1], words[2], words[3]};
  }
  return packed;
}

/// One value of a run-time floating type.
__device__ inline float load_float(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::kF16:
      return to_float(static_cast<const __half*>(data)[index]);
    case DType::kBF16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

__device__ inline void store_float(void* data, DType dtype, std::int64_t index, float value) {
  switch (dtype) {
    case DType::kF16:
      static_cast<__half*>(data)[index] = from_float<__half>(value);
      break;
    case DType::kBF16:
      static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

}  // namespace fastgpt::device
