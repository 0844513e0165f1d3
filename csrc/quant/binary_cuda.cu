#include <cuda_runtime.h>

#include "device/types.cuh"
#include "fastgpt/check.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

struct Args {
  void* x;
  std::uint8_t* packed;
  float* scale;
  float* offset;
  std::int64_t numel;
};

Args make_args(const BinaryParams& p) {
  return {p.x.data, p.packed.as<std::uint8_t>(), p.scale.as<float>(), p.offset.as<float>(),
          p.x.size(0)};
}

// One CTA of 128 threads owns one group. Each thread finds its value's place in the sorted order by
// counting; one thread then walks the 128 sums in double, in the order of the CPU, for equal bits.
// Norm gains only, so a serial walk of 128 steps is the whole cost.
template <class T>
__global__ void __launch_bounds__(kBlock) quantize_binary_kernel(const __grid_constant__ Args p) {
  __shared__ float values[kBlock];
  __shared__ float sorted[kBlock];
  __shared__ float threshold;
  const std::int64_t first = std::int64_t(blockIdx.x) * kBlock;
  const int count = int(min(std::int64_t(kBlock), p.numel - first));
  const int i = int(threadIdx.x);
  const float mine = i < count ? device::to_float(static_cast<const T*>(p.x)[first + i]) : 0.0F;
  values[i] = mine;
  sorted[i] = mine;  // ranks of NaN collide; every place still holds something
  __syncthreads();
  if (i < count) {
    int rank = 0;
    for (int j = 0; j < count; ++j) {
      rank += int(values[j] < mine || (values[j] == mine && j < i));
    }
    sorted[rank] = mine;
  }
  __syncthreads();
  if (i == 0) {
    double total = 0.0;
    for (int j = 0; j < count; ++j) total += double(sorted[j]);
    double best = -1.0, best_left = total, left = 0.0;
    int split = count - 1;
    for (int j = 0; j < count; ++j) {
      left += double(sorted[j]);
      const double right = total - left;
      // No fused multiply-add: the CPU rounds each step.
      double gain = __ddiv_rn(__dmul_rn(left, left), double(j + 1));
      if (j + 1 < count) {
        gain = __dadd_rn(gain, __ddiv_rn(__dmul_rn(right, right), double(count - j - 1)));
      }
      if (gain > best) {
        best = gain;
        split = j;
        best_left = left;
      }
    }
    const double low = best_left / (split + 1);
    const double high = split + 1 < count ? (total - best_left) / (count - 1 - split) : low;
    p.scale[blockIdx.x] = float((high - low) / 2);
    p.offset[blockIdx.x] = float((high + low) / 2);
    threshold = sorted[split];
  }
  __syncthreads();
  const unsigned bits = __ballot_sync(~0U, i < count && mine > threshold);
  const std::int64_t byte = first / 8 + i / 8;
  if (i % 8 == 0 && i < count) p.packed[byte] = std::uint8_t(bits >> (i % 32));
}

// One thread expands one value.
template <class T>
__global__ void __launch_bounds__(kBlock) dequantize_binary_kernel(const __grid_constant__ Args p) {
  const std::int64_t i = std::int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= p.numel) return;
  const bool bit = (p.packed[i / 8] >> (i % 8) & 1) != 0;
  const float scale = p.scale[blockIdx.x];
  static_cast<T*>(p.x)[i] = device::from_float<T>(p.offset[blockIdx.x] + (bit ? scale : -scale));
}

}  // namespace

void quantize_binary_cuda(const BinaryParams& p, const Stream& stream) {
  device::dispatch_float(p.x.dtype, [&](auto tag) {
    quantize_binary_kernel<decltype(tag)>
        <<<unsigned(p.scale.numel()), kBlock, 0, static_cast<cudaStream_t>(stream.handle)>>>(
            make_args(p));
  });
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

void dequantize_binary_cuda(const BinaryParams& p, const Stream& stream) {
  device::dispatch_float(p.x.dtype, [&](auto tag) {
    dequantize_binary_kernel<decltype(tag)>
        <<<unsigned(p.scale.numel()), kBlock, 0, static_cast<cudaStream_t>(stream.handle)>>>(
            make_args(p));
  });
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

}  // namespace fastgpt::quant
