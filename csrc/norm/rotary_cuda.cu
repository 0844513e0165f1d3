#include <cuda_runtime.h>

#include "device/types.cuh"
#include "fastgpt/check.h"
#include "norm/kernels.h"

namespace fastgpt::norm {
namespace {

constexpr int kThreads = 128;

struct Heads {
  void* data;
  std::int64_t token_stride;
  std::int64_t head_stride;
  int num_heads;
};

// One thread turns one pair of one head. Neighbouring threads take neighbouring pairs, so both
// halves of a head are read coalesced. Grid: (num_tokens, ceil(pairs of all heads / kThreads)).
// A position outside the table turns the pair into NaN, so that the mistake is seen.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const std::int64_t* positions, std::int64_t position_stride, const float* cos_sin,
                  std::int64_t table_stride, std::int64_t max_position, Heads q, Heads k,
                  int num_pairs, bool interleaved) {
  const std::int64_t token = blockIdx.x;
  const int index = int(blockIdx.y) * kThreads + int(threadIdx.x);
  if (index >= (q.num_heads + k.num_heads) * num_pairs) return;
  const int head = index / num_pairs;
  const int pair = index % num_pairs;
  const bool is_q = head < q.num_heads;
  const Heads& heads = is_q ? q : k;
  T* x = static_cast<T*>(heads.data) + token * heads.token_stride +
         std::int64_t(is_q ? head : head - q.num_heads) * heads.head_stride;
  const std::int64_t position = positions[token * position_stride];
  float cosine = __int_as_float(0x7FC00000);
  float sine = cosine;
  if (position >= 0 && position < max_position) {
    cosine = cos_sin[position * table_stride + pair];
    sine = cos_sin[position * table_stride + num_pairs + pair];
  }
  const int first = interleaved ? 2 * pair : pair;
  const int second = interleaved ? 2 * pair + 1 : pair + num_pairs;
  const float a = device::to_float(x[first]);
  const float b = device::to_float(x[second]);
  x[first] = device::from_float<T>(a * cosine - b * sine);
  x[second] = device::from_float<T>(b * cosine + a * sine);
}

Heads heads_of(const TensorView& view) {
  if (!view) return {};
  return {view.data, view.stride(0), view.stride(1), int(view.size(1))};
}

}  // namespace

void rotary_cuda(const RotaryParams& p, const Stream& stream) {
  const Heads q = heads_of(p.q);
  const Heads k = heads_of(p.k);
  const int num_pairs = int(p.cos_sin.size(1) / 2);
  const std::int64_t work = std::int64_t(q.num_heads + k.num_heads) * num_pairs;
  if (p.q.size(0) == 0 || work == 0) return;
  FASTGPT_CHECK(work <= 65535LL * kThreads, "q and k have ", q.num_heads + k.num_heads,
                " heads of ", num_pairs, " pairs; expected at most ", 65535LL * kThreads,
                " pairs a token");
  const dim3 grid(unsigned(p.q.size(0)), unsigned((work + kThreads - 1) / kThreads));
  device::dispatch_float(p.q.dtype, [&](auto tag) {
    rotary_kernel<decltype(tag)><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
        p.positions.as<std::int64_t>(), p.positions.stride(0), p.cos_sin.as<float>(),
        p.cos_sin.stride(0), p.cos_sin.size(0), q, k, num_pairs, p.interleaved);
  });
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

}  // namespace fastgpt::norm
