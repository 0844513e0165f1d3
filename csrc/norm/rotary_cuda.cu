#include <cuda_runtime.h>

#include "device/dependent.cuh"
#include "device/rotate.cuh"
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

struct RotaryArgs {
  const std::int64_t* positions;
  std::int64_t position_stride;
  device::AngleTable table;
  Heads q;
  Heads k;
  bool interleaved;
};

// One thread turns one pair of one head. Neighbouring threads take neighbouring pairs, so both
// halves of a head are read coalesced. Grid: (num_tokens, ceil(pairs of all heads / kThreads)).
// A position outside the table turns the pair into NaN, so that the mistake is seen.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const __grid_constant__ device::Dependent<RotaryArgs> dependent) {
  const RotaryArgs& p = dependent.wait();
  const int num_pairs = p.table.num_pairs;
  const std::int64_t token = blockIdx.x;
  const int index = int(blockIdx.y) * kThreads + int(threadIdx.x);
  if (index >= (p.q.num_heads + p.k.num_heads) * num_pairs) return;
  const int head = index / num_pairs;
  const int pair = index % num_pairs;
  const bool is_q = head < p.q.num_heads;
  const Heads& heads = is_q ? p.q : p.k;
  T* x = static_cast<T*>(heads.data) + token * heads.token_stride +
         std::int64_t(is_q ? head : head - p.q.num_heads) * heads.head_stride;
  const int first = p.interleaved ? 2 * pair : pair;
  const int second = p.interleaved ? 2 * pair + 1 : pair + num_pairs;
  const float2 result =
      device::rotate_pair(p.table, p.positions[token * p.position_stride], pair,
                          device::to_float(x[first]), device::to_float(x[second]));
  x[first] = device::from_float<T>(result.x);
  x[second] = device::from_float<T>(result.y);
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
  const RotaryArgs args{p.positions.as<std::int64_t>(),
                        p.positions.stride(0),
                        {p.cos_sin.as<float>(), p.cos_sin.stride(0), p.cos_sin.size(0), num_pairs},
                        q,
                        k,
                        p.interleaved};
  device::dispatch_float(p.q.dtype, [&](auto tag) {
    device::launch(rotary_kernel<decltype(tag)>, grid, kThreads, 0,
                   static_cast<cudaStream_t>(stream.handle), args);
  });
}

}  // namespace fastgpt::norm
