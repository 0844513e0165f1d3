// Short runs of elements that travel in one memory access.
#pragma once
#include <cstdint>

#include "device/types.cuh"
#include "fastgpt/tensor_view.h"

namespace fastgpt::device {

template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T values[kSize];
};

/// Elements of T in a 16-byte access.
template <class T>
constexpr int kPackSize = int(16 / sizeof(T));

template <int kSize, class T>
__device__ inline Pack<T, kSize> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, kSize>*>(p);
}

template <int kSize, class T>
__device__ inline void store_pack(T* p, const Pack<T, kSize>& pack) {
  *reinterpret_cast<Pack<T, kSize>*>(p) = pack;
}

/// Read kSize elements of a float dtype known at run time. The branch is uniform over the grid, so
/// it costs less than a kernel per pair of dtypes would cost in library size.
template <int kSize>
__device__ inline void load_as_float(const void* base, DType dtype, std::int64_t index,
                                     float (&values)[kSize]) {
  if (dtype == DType::kF32) {
    const float* p = static_cast<const float*>(base) + index;
    constexpr int kRun = kSize < 4 ? kSize : 4;  // 32 bytes are two accesses
#pragma unroll
    for (int i = 0; i < kSize; i += kRun) {
      const auto pack = load_pack<kRun>(p + i);
#pragma unroll
      for (int j = 0; j < kRun; ++j) values[i + j] = pack.values[j];
    }
  } else if (dtype == DType::kF16) {
    const auto pack = load_pack<kSize>(static_cast<const __half*>(base) + index);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_float(pack.values[i]);
  } else {
    const auto pack = load_pack<kSize>(static_cast<const __nv_bfloat16*>(base) + index);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_float(pack.values[i]);
  }
}

/// The inverse: round kSize values to a float dtype known at run time.
template <int kSize>
__device__ inline void store_from_float(void* base, DType dtype, std::int64_t index,
                                        const float (&values)[kSize]) {
  if (dtype == DType::kF32) {
    float* p = static_cast<float*>(base) + index;
    constexpr int kRun = kSize < 4 ? kSize : 4;
#pragma unroll
    for (int i = 0; i < kSize; i += kRun) {
      Pack<float, kRun> pack;
#pragma unroll
      for (int j = 0; j < kRun; ++j) pack.values[j] = values[i + j];
      store_pack(p + i, pack);
    }
  } else if (dtype == DType::kF16) {
    Pack<__half, kSize> pack;
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.values[i] = from_float<__half>(values[i]);
    store_pack(static_cast<__half*>(base) + index, pack);
  } else {
    Pack<__nv_bfloat16, kSize> pack;
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.values[i] = from_float<__nv_bfloat16>(values[i]);
    store_pack(static_cast<__nv_bfloat16*>(base) + index, pack);
  }
}

/// Host side: true if every row of the view (absent: true) starts at a multiple of 16 bytes and
/// its rows hold a whole number of runs of `size` elements.
inline bool rows_aligned(const TensorView& view, int size) {
  if (!view) return true;
  const std::int64_t bytes = dtype_bytes(view.dtype);
  const std::int64_t step = bytes * size < 16 ? bytes * size : 16;
  if (reinterpret_cast<std::uintptr_t>(view.data) % std::uintptr_t(step) != 0) return false;
  if (view.size(-1) % size != 0) return false;
  for (int i = 0; i + 1 < view.ndim; ++i) {
    if (view.size(i) > 1 && view.stride(i) * bytes % step != 0) return false;
  }
  return true;
}

}  // namespace fastgpt::device
