#include <cuda_runtime.h>

#include <algorithm>

#include "device/dependent.cuh"
#include "fastgpt/check.h"
#include "moe/kernels.h"

namespace fastgpt::moe {
namespace {

constexpr int kMaxWarps = 32;
constexpr int kSharedBytes = 48 << 10;

struct SortArgs {
  const std::int32_t* expert_ids;
  int num_rows;
  int num_experts;
  std::int32_t* sorted_rows;
  std::int32_t* offsets;
};

// Lanes with the same expert, and among them the number of lower ones.
__device__ unsigned same_expert(int expert, int* rank) {
  const unsigned peers = __match_any_sync(~0U, expert);
  *rank = __popc(peers & ((1U << (threadIdx.x % 32)) - 1));
  return peers;
}

// One CTA sorts everything: rows are few (tokens * top_k) and a second launch would cost more than
// it saves. Warp w owns a contiguous run of rows and a histogram of its own, so the sort is stable:
//
//   count[w][e] -> exclusive sum over (e, w) -> first place of expert e's rows of warp w
//
// Lanes with one expert count and place themselves through match_any; no atomics. Ids outside
// 0 .. num_experts - 1 are left out. Grid: 1.
__global__ void __launch_bounds__(kMaxWarps * 32)
    moe_sort_kernel(const __grid_constant__ device::Dependent<SortArgs> dependent) {
  extern __shared__ std::int32_t shared[];
  const SortArgs& args = dependent.wait();
  const std::int32_t* expert_ids = args.expert_ids;
  const int num_rows = args.num_rows;
  const int num_experts = args.num_experts;
  const int num_warps = int(blockDim.x / 32);
  const int warp = int(threadIdx.x / 32);
  const int lane = int(threadIdx.x % 32);
  std::int32_t* totals = shared;  // [num_experts], later the first place of each expert
  std::int32_t* counts = shared + num_experts + warp * num_experts;  // [num_warps][num_experts]
  for (int e = lane; e < num_experts; e += 32) counts[e] = 0;
  __syncwarp();

  const int run = ((num_rows + num_warps - 1) / num_warps + 31) / 32 * 32;
  const int first = min(warp * run, num_rows);
  const int last = min(first + run, num_rows);
  for (int i = first; i < last; i += 32) {
    const int expert = i + lane < last ? expert_ids[i + lane] : -1;
    int rank;
    const unsigned peers = same_expert(expert, &rank);
    if (rank == 0 && expert >= 0 && expert < num_experts) counts[expert] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();

  // Every warp's counts become the number of its expert's rows in lower warps.
  for (int e = int(threadIdx.x); e < num_experts; e += int(blockDim.x)) {
    std::int32_t sum = 0;
    for (int w = 0; w < num_warps; ++w) {
      std::int32_t& count = shared[num_experts + w * num_experts + e];
      const std::int32_t before = sum;
      sum += count;
      count = before;
    }
    totals[e] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    std::int32_t carry = 0;
    for (int base = 0; base < num_experts; base += 32) {
      const std::int32_t total = base + lane < num_experts ? totals[base + lane] : 0;
      std::int32_t sum = total;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const std::int32_t other = __shfl_up_sync(~0U, sum, offset);
        if (lane >= offset) sum += other;
      }
      if (base + lane < num_experts) {
        totals[base + lane] = carry + sum - total;
        args.offsets[base + lane] = carry + sum - total;
      }
      carry += __shfl_sync(~0U, sum, 31);
    }
    if (lane == 0) args.offsets[num_experts] = carry;
  }
  __syncthreads();

  for (int i = first; i < last; i += 32) {
    const int expert = i + lane < last ? expert_ids[i + lane] : -1;
    int rank;
    const unsigned peers = same_expert(expert, &rank);
    const bool valid = expert >= 0 && expert < num_experts;
    const std::int32_t place = valid ? totals[expert] + counts[expert] + rank : 0;
    __syncwarp();
    if (valid) {
      args.sorted_rows[place] = i + lane;
      if (rank == 0) counts[expert] += __popc(peers);
    }
    __syncwarp();
  }
}

}  // namespace

void moe_sort_cuda(const MoeSortParams& p, const Stream& stream) {
  const int num_rows = int(p.expert_ids.numel());
  const int num_experts = int(p.offsets.size(0) - 1);
  const int fitting = kSharedBytes / (4 * std::max(num_experts, 1)) - 1;  // one for the totals
  FASTGPT_CHECK(fitting >= 1, "offsets is for ", num_experts, " experts; expected at most ",
                kSharedBytes / 8);
  const int warps = std::clamp((num_rows + 31) / 32, 1, std::min(fitting, kMaxWarps));
  const int bytes = 4 * num_experts * (warps + 1);
  const SortArgs args{p.expert_ids.as<std::int32_t>(), num_rows, num_experts,
                      p.sorted_rows.as<std::int32_t>(), p.offsets.as<std::int32_t>()};
  device::launch(moe_sort_kernel, 1, unsigned(warps * 32), std::size_t(bytes),
                 static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace fastgpt::moe
