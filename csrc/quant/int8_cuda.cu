#include <cuda_runtime.h>

#include <algorithm>

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
  std::int8_t* packed;
  float* scale;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t stride;  // of x
};

Args make_args(const Int8Params& p) {
  return {p.x.data,     p.packed.as<std::int8_t>(), p.scale.as<float>(), p.x.size(0), p.x.size(1),
          p.x.stride(0)};
}

// One CTA owns a row: it reads it twice, the second time from cache. A value that is not finite
// makes the scale NaN; a kernel cannot refuse.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_int8_kernel(const __grid_constant__ Args p) {
  __shared__ float scratch[32];
  const std::int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.stride;
  float amax = 0.0F;
  bool is_finite = true;
  for (std::int64_t c = threadIdx.x; c < p.cols; c += kThreads) {
    const float value = fabsf(device::to_float(x[c]));
    amax = fmaxf(amax, value);
    is_finite &= value <= 3.402823466e38F;
  }
  amax = device::block_max(amax, scratch);
  if (__syncthreads_and(int(is_finite)) == 0) amax = __int_as_float(0x7FC00000);
  float scale = amax / kInt8Largest;
  if (scale <= 0.0F) scale = 1.0F;
  if (threadIdx.x == 0) p.scale[row] = scale;
  for (std::int64_t c = threadIdx.x; c < p.cols; c += kThreads) {
    const float rounded = rintf(device::to_float(x[c]) / scale);
    p.packed[row * p.cols + c] = std::int8_t(fminf(fmaxf(rounded, -kInt8Largest), kInt8Largest));
  }
}

// One thread expands one code. Grid-stride.
template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_int8_kernel(const __grid_constant__ Args p) {
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.rows * p.cols;
       i += step) {
    const std::int64_t row = i / p.cols, col = i % p.cols;
    static_cast<T*>(p.x)[row * p.stride + col] =
        device::from_float<T>(float(p.packed[i]) * p.scale[row]);
  }
}

}  // namespace

void quantize_int8_cuda(const Int8Params& p, const Stream& stream) {
  device::dispatch_float(p.x.dtype, [&](auto tag) {
    quantize_int8_kernel<decltype(tag)>
        <<<unsigned(p.x.size(0)), kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
            make_args(p));
  });
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

void dequantize_int8_cuda(const Int8Params& p, const Stream& stream) {
  const auto ctas =
      unsigned(std::min<std::int64_t>((p.x.numel() + kThreads - 1) / kThreads, 65535));
  device::dispatch_float(p.x.dtype, [&](auto tag) {
    dequantize_int8_kernel<decltype(tag)>
        <<<ctas, kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(make_args(p));
  });
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

}  // namespace fastgpt::quant
