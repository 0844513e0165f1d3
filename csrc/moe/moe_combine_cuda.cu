#include <cuda_runtime.h>

#include "device/dependent.cuh"
#include "device/pack.cuh"
#include "fastgpt/check.h"
#include "moe/kernels.h"

namespace fastgpt::moe {
namespace {

constexpr int kThreads = 128;
constexpr int kPack = 8;

struct CombineArgs {
  const void* y;
  DType y_dtype;
  std::int64_t y_token_stride;
  std::int64_t y_row_stride;
  const float* weights;
  std::int64_t weights_stride;
  const void* shared;  // nullptr = none
  std::int64_t shared_stride;
  void* out;
  DType out_dtype;
  std::int64_t out_stride;
  int top_k;
  int hidden;
  unsigned chunks;
};

// One thread sums kSize columns of one token over its experts, in their order: the result does not
// depend on the batch. Grid: num_tokens * chunks.
template <int kSize>
__global__ void __launch_bounds__(kThreads)
    moe_combine_kernel(const __grid_constant__ device::Dependent<CombineArgs> dependent) {
  const CombineArgs& args = dependent.wait();
  const std::int64_t token = blockIdx.x / args.chunks;
  const int column = int((blockIdx.x % args.chunks) * kThreads + threadIdx.x) * kSize;
  if (column >= args.hidden) return;
  float sum[kSize] = {};
#pragma unroll 4
  for (int j = 0; j < args.top_k; ++j) {
    float values[kSize];
    device::load_as_float<kSize>(
        args.y, args.y_dtype, token * args.y_token_stride + j * args.y_row_stride + column, values);
    const float weight = args.weights[token * args.weights_stride + j];
#pragma unroll
    for (int e = 0; e < kSize; ++e) sum[e] += weight * values[e];
  }
  if (args.shared != nullptr) {
    float values[kSize];
    device::load_as_float<kSize>(args.shared, args.y_dtype, token * args.shared_stride + column,
                                 values);
#pragma unroll
    for (int e = 0; e < kSize; ++e) sum[e] += values[e];
  }
  device::store_from_float<kSize>(args.out, args.out_dtype, token * args.out_stride + column, sum);
}

}  // namespace

void moe_combine_cuda(const MoeCombineParams& p, const Stream& stream) {
  const std::int64_t num_tokens = p.out.size(0);
  const std::int64_t hidden = p.out.size(1);
  const bool aligned = device::rows_aligned(p.y, kPack) && device::rows_aligned(p.shared, kPack) &&
                       device::rows_aligned(p.out, kPack);
  const std::int64_t width = std::int64_t(aligned ? kPack : 1) * kThreads;
  const std::int64_t chunks = (hidden + width - 1) / width;
  FASTGPT_CHECK(num_tokens * chunks < (std::int64_t(1) << 31), "out has ", num_tokens, " rows of ",
                hidden, ", too many for one launch; split the rows");
  const CombineArgs args{p.y.data,
                         p.y.dtype,
                         p.y.stride(0),
                         p.y.stride(1),
                         p.weights.as<float>(),
                         p.weights.stride(0),
                         p.shared.data,
                         p.shared ? p.shared.stride(0) : 0,
                         p.out.data,
                         p.out.dtype,
                         p.out.stride(0),
                         int(p.y.size(1)),
                         int(hidden),
                         unsigned(chunks)};
  const auto kernel = aligned ? moe_combine_kernel<kPack> : moe_combine_kernel<1>;
  device::launch(kernel, unsigned(num_tokens * chunks), kThreads, 0,
                 static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace fastgpt::moe
