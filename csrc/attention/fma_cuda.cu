#include "attention/cache_tile.cuh"
#include "device/dependent.cuh"
#include "device/types.cuh"
#include "device/vec.cuh"
#include "fastgpt/check.h"
#include "fastgpt/kv_format.h"

namespace fastgpt::attention {
namespace {

constexpr int kWarps = 4;
constexpr int kStepKeys = 4;  // keys a warp handles at once: their reductions overlap

/// Where a token's row, its scales and its rotary columns stand.
struct CachedToken {
  std::int64_t row;
  std::int64_t scale;
  std::int64_t pe;
};

template <class C>
__device__ CachedToken find_token(const PagedArgs& args, int kv_head, std::int64_t block,
                                  int slot) {
  CachedToken token{
      block * args.block_stride + slot * args.slot_stride + kv_head * args.kv_head_stride, 0, 0};
  if constexpr (kIsCode<C>) {
    token.scale = block * args.scale_block_stride + slot * args.scale_slot_stride +
                  kv_head * args.scale_head_stride;
    token.pe = block * args.pe_block_stride + slot * args.pe_slot_stride;
  }
  return token;
}

/// One element of a token's key or value, dequantized.
template <class C, bool kIsValue>
__device__ float cached_element(const PagedArgs& args, const CachedToken& token, int column) {
  const C* row = static_cast<const C*>(args.kv) + token.row + (kIsValue ? args.value_offset : 0);
  if constexpr (!kIsCode<C>) {
    return device::to_float(row[column]);
  } else {
    std::int64_t scale = token.scale + (kIsValue ? args.scale_value_offset : 0);
    if (args.latent > 0) {
      if (column >= args.latent) {
        return device::load_float(args.pe, args.pe_dtype, token.pe + column - args.latent);
      }
      scale += column / int(kLatentGroup);
    }
    if constexpr (std::is_same_v<C, Fp8>) {
      return device::fp8_to_float(row[column].bits) * args.kv_scale[scale];
    } else {
      return float(row[column]) * args.kv_scale[scale];
    }
  }
}

// One CTA owns one query row of one head; its warps take four keys each in turn, lanes share the
// columns (lane, lane + 32, ...), and the warps' softmax states merge at the end. Plain float32
// arithmetic and element loads: any dtype, alignment and head size up to 32 * kPerLane.
// Grid: (num_tokens, num_heads).
template <class T, class C, int kPerLane>
__global__ void __launch_bounds__(kWarps * 32)
    fma_kernel(const __grid_constant__ device::Dependent<PagedArgs> dependent) {
  const PagedArgs& args = dependent.wait();
  __shared__ float merged[kWarps][32 * kPerLane];
  __shared__ float maxima[kWarps];
  __shared__ float sums[kWarps];
  const int token = int(blockIdx.x);
  const int head = int(blockIdx.y);
  const int warp = int(threadIdx.x / 32);
  const int lane = int(threadIdx.x % 32);
  if (token >= args.cu_seqlens_q[args.num_reqs]) return;  // padding rows are not touched
  int req = 0;  // the last request that starts at or before the token
  for (int last = args.num_reqs - 1; req < last;) {
    const int middle = (req + last + 1) / 2;
    if (args.cu_seqlens_q[middle] <= token) {
      req = middle;
    } else {
      last = middle - 1;
    }
  }
  const RequestView request = request_view(args, req);
  const int end = min(request.seq_len, request.num_keys(token - request.first_token));

  const T* q =
      static_cast<const T*>(args.q) + token * args.q_token_stride + head * args.q_head_stride;
  float query[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int column = lane + i * 32;
    query[i] = column < args.head_dim_qk ? device::to_float(q[column]) * args.scale : 0.0F;
  }
  float maximum = -INFINITY;
  float sum = 0.0F;
  float out[kPerLane] = {};
  for (int first = warp * kStepKeys; first < end; first += kWarps * kStepKeys) {
    CachedToken key_token[kStepKeys];
    float score[kStepKeys];
#pragma unroll
    for (int j = 0; j < kStepKeys; ++j) {
      const int key = min(first + j, end - 1);
      key_token[j] =
          find_token<C>(args, head / args.group, request.block_table[key / args.block_size],
                        key % args.block_size);
      score[j] = 0.0F;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int column = lane + i * 32;
        if (column < args.head_dim_qk) {
          score[j] = fmaf(query[i], cached_element<C, false>(args, key_token[j], column), score[j]);
        }
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (int j = 0; j < kStepKeys; ++j) score[j] += __shfl_xor_sync(~0U, score[j], step);
    }
    float top = maximum;
#pragma unroll
    for (int j = 0; j < kStepKeys; ++j) {
      if (first + j >= end) score[j] = -INFINITY;
      top = fmaxf(top, score[j]);
    }
    const float factor = expf(maximum - top);
    maximum = top;
    sum *= factor;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out[i] *= factor;
#pragma unroll
    for (int j = 0; j < kStepKeys; ++j) {
      const float p = expf(score[j] - top);
      sum += p;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int column = lane + i * 32;
        if (column < args.head_dim_v) {
          out[i] = fmaf(p, cached_element<C, true>(args, key_token[j], column), out[i]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) merged[warp][lane + i * 32] = out[i];
  if (lane == 0) {
    maxima[warp] = maximum;
    sums[warp] = sum;
  }
  __syncthreads();
  float top = maxima[0];
  for (int w = 1; w < kWarps; ++w) top = fmaxf(top, maxima[w]);
  float total = 0.0F;
  float weight[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    weight[w] = maxima[w] == -INFINITY ? 0.0F : expf(maxima[w] - top);
    total += weight[w] * sums[w];
  }
  const float inv = total > 0.0F ? 1.0F / total : 0.0F;
  T* target =
      static_cast<T*>(args.out) + token * args.out_token_stride + head * args.out_head_stride;
  for (int column = int(threadIdx.x); column < args.head_dim_v; column += kWarps * 32) {
    float value = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += weight[w] * merged[w][column];
    target[column] = device::from_float<T>(value * inv);
  }
}

template <class T, class C>
void launch(const PagedArgs& args, const Stream& stream) {
  FASTGPT_CHECK(args.num_heads <= 65535, "q has ", args.num_heads,
                " heads; expected at most 65535");
  const dim3 grid(unsigned(args.num_tokens), unsigned(args.num_heads));
  const auto kernel = args.head_dim_qk <= 256 ? fma_kernel<T, C, 8> : fma_kernel<T, C, 18>;
  device::launch(kernel, grid, kWarps * 32, 0, static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace

void launch_fma(const PagedArgs& args, DType dtype, DType cache_dtype, const Stream& stream) {
  FASTGPT_CHECK(args.head_dim_qk <= 576, "q has head size ", args.head_dim_qk,
                "; expected at most 576");
  device::dispatch_float(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (cache_dtype == DType::kU8) return launch<T, Fp8>(args, stream);
    if (cache_dtype == DType::kI8) return launch<T, std::int8_t>(args, stream);
    device::dispatch_float(cache_dtype,
                           [&](auto cache_tag) { launch<T, decltype(cache_tag)>(args, stream); });
  });
}

}  // namespace fastgpt::attention
