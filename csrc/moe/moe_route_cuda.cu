#include <cuda_runtime.h>

#include "device/dependent.cuh"
#include "device/order.cuh"
#include "device/reduce.cuh"
#include "fastgpt/check.h"
#include "moe/kernels.h"

namespace fastgpt::moe {
namespace {

constexpr int kMaxExperts = 4096;  // two floats each in 48 KiB of shared memory

struct RouteArgs {
  const float* logits;
  std::int64_t logits_stride;
  const float* correction_bias;  // nullptr = none
  std::int32_t* expert_ids;
  std::int64_t expert_ids_stride;
  float* weights;
  std::int64_t weights_stride;
  int num_experts;
  int top_k;
  int num_groups;
  int topk_groups;
  Scoring scoring;
  bool renormalize;
  float scaling;
};

// Take the largest of values[0 .. n): its index to every lane. Equal values: the lowest index; NaN
// only when nothing else is left; a taken entry has key 0 and never wins again.
__device__ int take_largest(const float* values, bool* taken, int n) {
  std::uint64_t best = 0;
  for (int i = int(threadIdx.x); i < n; i += 32) {
    if (!taken[i]) best = max(best, device::order_key(values[i], std::uint32_t(i)));
  }
  best = device::warp_max(best);
  const int index = int(device::key_index(best));
  if (threadIdx.x == 0) taken[index] = true;
  __syncwarp();
  return index;
}

// One warp routes one token; scores live in shared memory. Grid: num_tokens.
__global__ void __launch_bounds__(32)
    moe_route_kernel(const __grid_constant__ device::Dependent<RouteArgs> dependent) {
  const RouteArgs& args = dependent.wait();
  extern __shared__ float shared[];
  const int num_experts = args.num_experts;
  float* score = shared;                // what the weights are made of
  float* choice = score + num_experts;  // what the selection compares
  float* group = choice + num_experts;
  bool* taken = reinterpret_cast<bool*>(group + args.num_groups);
  bool* group_taken = taken + num_experts;
  const std::int64_t token = blockIdx.x;
  const float* logits = args.logits + token * args.logits_stride;
  const int lane = int(threadIdx.x);

  float largest = -INFINITY;
  float total = 0.0F;
  if (args.scoring == Scoring::kSoftmax) {
    for (int e = lane; e < num_experts; e += 32) largest = fmaxf(largest, logits[e]);
    largest = device::warp_max(largest);
    for (int e = lane; e < num_experts; e += 32) total += score[e] = expf(logits[e] - largest);
    total = device::warp_sum(total);
  }
  for (int e = lane; e < num_experts; e += 32) {
    const float value =
        args.scoring == Scoring::kSoftmax ? score[e] / total : 1.0F / (1.0F + expf(-logits[e]));
    score[e] = value;
    choice[e] = args.correction_bias != nullptr ? value + args.correction_bias[e] : value;
    taken[e] = false;
  }
  __syncwarp();

  if (args.topk_groups < args.num_groups) {
    const int width = num_experts / args.num_groups;
    for (int g = lane; g < args.num_groups; g += 32) {
      float best = -INFINITY;
      float second = -INFINITY;
      for (int e = g * width; e < (g + 1) * width; ++e) {
        if (choice[e] > best) {
          second = best;
          best = choice[e];
        } else {
          second = fmaxf(second, choice[e]);
        }
      }
      group[g] = args.correction_bias != nullptr && width > 1 ? best + second : best;
      group_taken[g] = false;
    }
    __syncwarp();
    for (int i = 0; i < args.topk_groups; ++i) take_largest(group, group_taken, args.num_groups);
    for (int e = lane; e < num_experts; e += 32) taken[e] = !group_taken[e / width];
    __syncwarp();
  }

  std::int32_t* ids = args.expert_ids + token * args.expert_ids_stride;
  float* weights = args.weights + token * args.weights_stride;
  total = 0.0F;
  for (int j = 0; j < args.top_k; ++j) {
    const int expert = take_largest(choice, taken, num_experts);
    total += score[expert];
    if (lane == 0) {
      ids[j] = expert;
      weights[j] = score[expert];
    }
  }
  const float factor = args.renormalize ? args.scaling / (total + 1e-20F) : args.scaling;
  if (lane == 0) {
    for (int j = 0; j < args.top_k; ++j) weights[j] *= factor;
  }
}

}  // namespace

void moe_route_cuda(const MoeRouteParams& p, const Stream& stream) {
  const std::int64_t num_experts = p.logits.size(1);
  FASTGPT_CHECK(num_experts <= kMaxExperts, "logits has ", num_experts,
                " experts; expected at most ", kMaxExperts);
  const RouteArgs args{p.logits.as<float>(),
                       p.logits.stride(0),
                       p.correction_bias.as<float>(),
                       p.expert_ids.as<std::int32_t>(),
                       p.expert_ids.stride(0),
                       p.weights.as<float>(),
                       p.weights.stride(0),
                       int(num_experts),
                       p.top_k,
                       p.num_groups,
                       p.topk_groups,
                       p.scoring,
                       p.renormalize,
                       p.scaling};
  const std::size_t bytes = std::size_t(2 * num_experts + p.num_groups) * sizeof(float) +
                            std::size_t(num_experts + p.num_groups);
  FASTGPT_CHECK(bytes <= 48 << 10, "num_groups is ", p.num_groups, " for ", num_experts,
                " experts; their scores need more than 48 KiB of shared memory");
  device::launch(moe_route_kernel, unsigned(p.logits.size(0)), 32, bytes,
                 static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace fastgpt::moe
