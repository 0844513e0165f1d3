// Reductions over a warp and over a CTA. Every thread receives the result.
#pragma once

namespace fastgpt::device {

__device__ inline float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0U, value, offset);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0U, value, offset));
  }
  return value;
}

/// Sum over the CTA; blockDim.x is a multiple of 32. scratch: 32 floats of shared memory, free for
/// reuse after the call.
__device__ inline float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  const unsigned warp = threadIdx.x / 32;
  const unsigned num_warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) scratch[warp] = value;
  __syncthreads();
  value = threadIdx.x % 32 < num_warps ? scratch[threadIdx.x % 32] : 0.0F;
  value = warp_sum(value);
  __syncthreads();
  return value;
}

/// Maximum over the CTA of values >= 0, under block_sum's conditions.
__device__ inline float block_max(float value, float* scratch) {
  value = warp_max(value);
  const unsigned warp = threadIdx.x / 32;
  const unsigned num_warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) scratch[warp] = value;
  __syncthreads();
  value = threadIdx.x % 32 < num_warps ? scratch[threadIdx.x % 32] : 0.0F;
  value = warp_max(value);
  __syncthreads();
  return value;
}

}  // namespace fastgpt::device
