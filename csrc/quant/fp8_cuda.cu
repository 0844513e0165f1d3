#include <cuda_runtime.h>

#include <algorithm>

#include "device/dequant.cuh"
#include "device/reduce.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"
#include "fastgpt/fp8.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

constexpr int kThreads = 256;

struct Args {
  void* x;
  std::uint8_t* packed;
  float* scale;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t stride;      // of x
  std::int64_t group_rows;  // rows and columns that share a scale: (1, cols) or (128, 128)
  std::int64_t group_cols;
};

Args make_args(const Fp8Params& p) {
  const bool per_block = p.scale.ndim == 2;
  return {p.x.data,
          p.packed.as<std::uint8_t>(),
          p.scale.as<float>(),
          p.x.size(0),
          p.x.size(1),
          p.x.stride(0),
          per_block ? kBlock : 1,
          per_block ? kBlock : p.x.size(1)};
}

// One CTA owns the values of one scale: it reads them twice, the second time from cache.
// A NaN makes the whole group NaN codes; a kernel cannot refuse.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_fp8_kernel(const __grid_constant__ Args p) {
  __shared__ float scratch[32];
  const T* x = static_cast<const T*>(p.x);
  const std::int64_t groups_per_row = (p.cols + p.group_cols - 1) / p.group_cols;
  const std::int64_t row0 = std::int64_t(blockIdx.x) / groups_per_row * p.group_rows;
  const std::int64_t col0 = std::int64_t(blockIdx.x) % groups_per_row * p.group_cols;
  const std::int64_t num_cols = min(p.group_cols, p.cols - col0);
  const std::int64_t count = min(p.group_rows, p.rows - row0) * num_cols;
  float amax = 0.0F;
  bool has_nan = false;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    const float value =
        fabsf(device::to_float(x[(row0 + i / num_cols) * p.stride + col0 + i % num_cols]));
    amax = fmaxf(amax, value);
    has_nan |= !(value <= 3.402823466e38F);
  }
  amax = device::block_max(amax, scratch);
  if (__syncthreads_or(int(has_nan)) != 0) amax = __int_as_float(0x7FC00000);
  float scale = amax / kFp8Largest;
  if (scale <= 0.0F) scale = 1.0F;
  if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    const std::int64_t row = row0 + i / num_cols, col = col0 + i % num_cols;
    p.packed[row * p.cols + col] =
        device::float_to_fp8(device::to_float(x[row * p.stride + col]) / scale);
  }
}

// One thread expands one code. Grid-stride.
template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_fp8_kernel(const __grid_constant__ Args p) {
  const std::int64_t groups_per_row = (p.cols + p.group_cols - 1) / p.group_cols;
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.rows * p.cols;
       i += step) {
    const std::int64_t row = i / p.cols, col = i % p.cols;
    const float scale = p.scale[row / p.group_rows * groups_per_row + col / p.group_cols];
    static_cast<T*>(p.x)[row * p.stride + col] =
        device::from_float<T>(device::fp8_to_float(p.packed[i]) * scale);
  }
}

}  // namespace

void quantize_fp8_cuda(const Fp8Params& p, const Stream& stream) {
  device::dispatch_float(p.x.dtype, [&](auto tag) {
    quantize_fp8_kernel<decltype(tag)>
        <<<unsigned(p.scale.numel()), kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
            make_args(p));
  });
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

void dequantize_fp8_cuda(const Fp8Params& p, const Stream& stream) {
  const auto ctas =
      unsigned(std::min<std::int64_t>((p.x.numel() + kThreads - 1) / kThreads, 65535));
  device::dispatch_float(p.x.dtype, [&](auto tag) {
    dequantize_fp8_kernel<decltype(tag)>
        <<<ctas, kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(make_args(p));
  });
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

}  // namespace fastgpt::quant
