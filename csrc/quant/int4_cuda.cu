#include <cuda_runtime.h>

#include <algorithm>

#include "device/reduce.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

constexpr int kThreads = 256;

struct Args {
  void* x;
  std::uint8_t* packed;
  __half* scale;
  std::uint8_t* zero_point;  // nullptr = symmetric
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t stride;     // of x
  std::int64_t row_bytes;  // of packed
  std::int64_t groups;     // of one row
  int group_size;
};

Args make_args(const Int4Params& p) {
  return {p.x.data,
          p.packed.as<std::uint8_t>(),
          p.scale.as<__half>(),
          p.zero_point.as<std::uint8_t>(),
          p.x.size(0),
          p.x.size(1),
          p.x.stride(0),
          p.packed.size(1),
          p.scale.size(1),
          p.group_size};
}

// One warp owns one group of one row; the warp of the last group also writes the row's padding.
// Values that are not finite give a NaN scale; a kernel cannot refuse.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_int4_kernel(const __grid_constant__ Args p) {
  const std::int64_t index = std::int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (index >= p.rows * p.groups) return;
  const int lane = int(threadIdx.x % 32);
  const std::int64_t row = index / p.groups, group = index % p.groups;
  const std::int64_t first = group * p.group_size;
  const std::int64_t last = min(p.cols, first + p.group_size);
  const T* x = static_cast<const T*>(p.x) + row * p.stride;
  float low = 0.0F, high = 0.0F;
  bool finite = true;
  for (std::int64_t c = first + lane; c < last; c += 32) {
    const float value = device::to_float(x[c]);
    low = fminf(low, value);
    high = fmaxf(high, value);
    finite &= fabsf(value) <= 3.402823466e38F;
  }
  low = -device::warp_max(-low);
  high = device::warp_max(high);
  finite = __all_sync(~0U, int(finite)) != 0;

  const bool symmetric = p.zero_point == nullptr;
  const float range = symmetric ? fmaxf(high, -low) : high - low;
  __half half_scale = __float2half_rn(range / (symmetric ? 7.0F : 15.0F));
  if (range == 0.0F) half_scale = __float2half_rn(1.0F);
  if (__half_as_ushort(half_scale) == 0) half_scale = __ushort_as_half(1);
  if (!finite) half_scale = __ushort_as_half(0x7E00);
  const float scale = __half2float(half_scale);
  int zero = 8;
  if (!symmetric) {
    // fmin and fmax turn a NaN into a bound, so the conversion is defined.
    zero = int(fminf(fmaxf(rintf(-low / scale), 0.0F), 15.0F));
  }
  if (lane == 0) {
    p.scale[index] = half_scale;
    if (!symmetric) p.zero_point[index] = std::uint8_t(zero);
  }
  const float lowest = symmetric ? -7.0F : float(-zero);
  const float highest = symmetric ? 7.0F : float(15 - zero);
  std::uint8_t* packed = p.packed + row * p.row_bytes;
  // A byte holds two columns of this group: group_size is even.
  const std::int64_t end = group == p.groups - 1 ? p.row_bytes * 2 : last;
  for (std::int64_t c = first + lane * 2; c < end; c += 64) {
    unsigned byte = 0;
    for (int j = 0; j < 2; ++j) {
      int code = zero;
      if (c + j < last) {
        const float rounded = rintf(device::to_float(x[c + j]) / scale);
        code += int(fminf(fmaxf(rounded, lowest), highest));
      }
      byte |= unsigned(code) << (4 * j);
    }
    packed[c / 2] = std::uint8_t(byte);
  }
}

// One thread expands one byte, two columns of one row. Grid-stride.
template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_int4_kernel(const __grid_constant__ Args p) {
  const std::int64_t bytes = (p.cols + 1) / 2;  // of a row, without padding
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.rows * bytes;
       i += step) {
    const std::int64_t row = i / bytes, b = i % bytes;
    const std::int64_t group = row * p.groups + 2 * b / p.group_size;
    const float scale = __half2float(p.scale[group]);
    const int zero = p.zero_point ? p.zero_point[group] : 8;
    const std::uint8_t byte = p.packed[row * p.row_bytes + b];
    T* x = static_cast<T*>(p.x) + row * p.stride + 2 * b;
    x[0] = device::from_float<T>(float((byte & 15) - zero) * scale);
    if (2 * b + 1 < p.cols) x[1] = device::from_float<T>(float((byte >> 4) - zero) * scale);
  }
}

}  // namespace

void quantize_int4_cuda(const Int4Params& p, const Stream& stream) {
  const std::int64_t warps = p.scale.numel();
  const auto ctas = unsigned((warps * 32 + kThreads - 1) / kThreads);
  device::dispatch_float(p.x.dtype, [&](auto tag) {
    quantize_int4_kernel<decltype(tag)>
        <<<ctas, kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(make_args(p));
  });
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

void dequantize_int4_cuda(const Int4Params& p, const Stream& stream) {
  const auto ctas =
      unsigned(std::min<std::int64_t>((p.x.numel() + kThreads - 1) / kThreads, 65535));
  device::dispatch_float(p.x.dtype, [&](auto tag) {
    dequantize_int4_kernel<decltype(tag)>
        <<<ctas, kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(make_args(p));
  });
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

}  // namespace fastgpt::quant
