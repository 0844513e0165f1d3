#include <algorithm>

#include "attention/paged.cuh"
#include "device/dependent.cuh"
#include "device/pack.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"

namespace fastgpt::attention {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kGroups = 8;  // of threads that take the splits of a row in turn, at most

// One CTA merges the splits of one query row:
//
//   out = sum_s exp(lse_s - lse) * partial_s,   lse = log(sum_s exp(lse_s))
//
// A thread owns four columns, and several groups of threads take the splits in turn, so that many
// splits are not one long chain of loads.
// Rows that were not split (their kernel wrote them) leave at once. Grid: (rows of a request,
// num_reqs). Source: FlashDecoding; FlashAttention-2, arXiv:2307.08691, section 3.1.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    combine_splits_kernel(const __grid_constant__ device::Dependent<PagedArgs> dependent) {
  const PagedArgs& args = dependent.wait();
  __shared__ float4 gathered[kMaxThreads];
  __shared__ float gathered_weight[kMaxThreads];
  const int req = int(blockIdx.y);
  const int token = int(blockIdx.x) / args.num_heads;
  const int head = int(blockIdx.x) % args.num_heads;
  const RequestView request = request_view(args, req);
  if (token >= request.q_len || request.q_len > kMaxDecodeTokens) return;
  const int num_active = split_range(request, args.num_splits, 0).num_active;
  if (num_active == 1) return;

  const int quads = args.head_dim_v / 4;
  const int num_groups = int(blockDim.x) / quads;
  const int group = int(threadIdx.x) / quads;
  const std::int64_t split_stride =
      std::int64_t(args.num_reqs) * args.tokens_per_req * args.num_heads;
  const std::int64_t first = partial_row(args, 0, req, token, head);

  float top = -INFINITY;
  for (int s = int(threadIdx.x % 32); s < num_active; s += 32) {
    top = fmaxf(top, args.partial_lse[first + s * split_stride]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0U, top, offset));
  }
  const float base = top == -INFINITY ? 0.0F : top;

  const int quad = int(threadIdx.x) % quads;
  float4 total = {};
  float weights = 0.0F;
  if (group < num_groups) {
#pragma unroll 4
    for (int s = group; s < num_active; s += num_groups) {
      const std::int64_t row = first + s * split_stride;
      const float weight = exp2f((args.partial_lse[row] - base) * kLog2e);
      const float4 part =
          *reinterpret_cast<const float4*>(args.partial + row * args.head_dim_v + quad * 4);
      weights += weight;
      total.x += weight * part.x;
      total.y += weight * part.y;
      total.z += weight * part.z;
      total.w += weight * part.w;
    }
  }
  gathered[threadIdx.x] = total;
  gathered_weight[threadIdx.x] = weights;
  __syncthreads();
  if (group != 0) return;
  for (int g = 1; g < num_groups; ++g) {
    const float4 part = gathered[threadIdx.x + g * quads];
    total.x += part.x;
    total.y += part.y;
    total.z += part.z;
    total.w += part.w;
    weights += gathered_weight[threadIdx.x + g * quads];
  }
  const float inv = weights > 0.0F ? 1.0F / weights : 0.0F;
  device::Pack<T, 4> pack;
  pack.values[0] = device::from_float<T>(total.x * inv);
  pack.values[1] = device::from_float<T>(total.y * inv);
  pack.values[2] = device::from_float<T>(total.z * inv);
  pack.values[3] = device::from_float<T>(total.w * inv);
  device::store_pack(static_cast<T*>(args.out) +
                         (request.first_token + token) * args.out_token_stride +
                         head * args.out_head_stride + quad * 4,
                     pack);
}

// What is in front of this kernel is the same operation's, and it touches nothing before its wait:
// the two overlap whatever the caller's scope says.
class OverlapAnyway {
 public:
  OverlapAnyway() { set_overlap_launches(true); }
  ~OverlapAnyway() { set_overlap_launches(before_); }
  OverlapAnyway(const OverlapAnyway&) = delete;
  OverlapAnyway& operator=(const OverlapAnyway&) = delete;

 private:
  bool before_ = overlap_launches();
};

}  // namespace

void launch_combine(const PagedArgs& args, DType dtype, const Stream& stream) {
  FASTGPT_CHECK(args.head_dim_v <= 4 * kMaxThreads, "head_dim_v is ", args.head_dim_v,
                "; expected at most ", 4 * kMaxThreads);
  const int quads = args.head_dim_v / 4;
  const int threads = std::min((quads * kGroups + 31) / 32 * 32, kMaxThreads);
  const dim3 grid(unsigned(args.tokens_per_req * args.num_heads), unsigned(args.num_reqs));
  const auto kernel =
      dtype == DType::kF16 ? combine_splits_kernel<__half> : combine_splits_kernel<__nv_bfloat16>;
  const OverlapAnyway overlap;
  device::launch(kernel, grid, unsigned(threads), 0, static_cast<cudaStream_t>(stream.handle),
                 args);
}

}  // namespace fastgpt::attention
