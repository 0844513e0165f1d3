#include <cuda_runtime.h>

#include "device/dependent.cuh"
#include "device/rotate.cuh"
#include "device/types.cuh"
#include "device/vec.cuh"
#include "fastgpt/check.h"
#include "fastgpt/kv_format.h"
#include "kv_cache/heads.cuh"
#include "kv_cache/kernels.h"

namespace fastgpt::kv_cache {
namespace {

constexpr int kThreads = 128;

struct RotaryWriteArgs {
  const std::int64_t* positions;
  std::int64_t position_stride;
  device::AngleTable table;
  Heads q;
  Heads k;
  Heads v;
  bool interleaved;
  const std::int64_t* slot_mapping;
  std::int64_t slot_mapping_stride;
  void* cache;
  DType cache_dtype;
  std::int64_t num_blocks;
  std::int64_t block_size;
  std::int64_t block_stride;
  std::int64_t value_offset;
  std::int64_t slot_stride;
  std::int64_t cache_head_stride;
};

// One thread turns one pair of one head of q or k, or copies one element that is not turned: of k
// behind the rotary columns, or of v. It alone touches its elements, so k is stored from registers
// while it is also updated. Grid: (num_tokens, ceil(work of a token / kThreads)), where the work is
//
//   pairs of q | pairs of k | rest of k | v
//
// A position outside the table turns the pair into NaN; a slot outside the cache stores nothing.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rotary_write_kv_kernel(const __grid_constant__ device::Dependent<RotaryWriteArgs> dependent) {
  const RotaryWriteArgs& p = dependent.wait();
  const std::int64_t token = blockIdx.x;
  int index = int(blockIdx.y) * kThreads + int(threadIdx.x);
  const std::int64_t slot = p.slot_mapping[token * p.slot_mapping_stride];
  const bool is_stored = slot >= 0 && slot < p.num_blocks * p.block_size;
  const std::int64_t target =
      is_stored ? slot / p.block_size * p.block_stride + slot % p.block_size * p.slot_stride : 0;

  const int num_pairs = p.table.num_pairs;
  const int turned = (p.q.num_heads + p.k.num_heads) * num_pairs;
  if (index < turned) {
    const int head = index / num_pairs;
    const int pair = index % num_pairs;
    const int kv_head = head - p.q.num_heads;
    T* x = kv_head < 0 ? head_row<T>(p.q, token, head) : head_row<T>(p.k, token, kv_head);
    const int first = p.interleaved ? 2 * pair : pair;
    const int second = p.interleaved ? 2 * pair + 1 : pair + num_pairs;
    const float2 result =
        device::rotate_pair(p.table, p.positions[token * p.position_stride], pair,
                            device::to_float(x[first]), device::to_float(x[second]));
    const T a = device::from_float<T>(result.x);
    const T b = device::from_float<T>(result.y);
    x[first] = a;
    x[second] = b;
    if (kv_head >= 0 && is_stored) {
      const std::int64_t row = target + kv_head * p.cache_head_stride;
      device::store_float(p.cache, p.cache_dtype, row + first, device::to_float(a));
      device::store_float(p.cache, p.cache_dtype, row + second, device::to_float(b));
    }
    return;
  }
  if (!is_stored) return;
  index -= turned;
  const int rest = p.k.width - 2 * num_pairs;
  if (index < p.k.num_heads * rest) {
    const int head = index / rest;
    const int column = 2 * num_pairs + index % rest;
    device::store_float(p.cache, p.cache_dtype, target + head * p.cache_head_stride + column,
                        device::to_float(head_row<T>(p.k, token, head)[column]));
    return;
  }
  index -= p.k.num_heads * rest;
  if (index >= p.v.num_heads * p.v.width) return;
  const int head = index / p.v.width;
  const int column = index % p.v.width;
  device::store_float(p.cache, p.cache_dtype,
                      target + p.value_offset + head * p.cache_head_stride + column,
                      device::to_float(head_row<T>(p.v, token, head)[column]));
}

}  // namespace

void rotary_write_kv_cuda(const RotaryWriteKvParams& p, const Stream& stream) {
  if (is_code(p.kv_cache.dtype)) return rotary_write_codes_cuda(p, stream);
  const int num_pairs = int(p.cos_sin.size(1) / 2);
  const RotaryWriteArgs args{
      p.positions.as<std::int64_t>(),
      p.positions.stride(0),
      {p.cos_sin.as<float>(), p.cos_sin.stride(0), p.cos_sin.size(0), num_pairs},
      heads_of(p.q),
      heads_of(p.k),
      heads_of(p.v),
      p.interleaved,
      p.slot_mapping.as<std::int64_t>(),
      p.slot_mapping.stride(0),
      p.kv_cache.data,
      p.kv_cache.dtype,
      p.kv_cache.size(0),
      p.kv_cache.size(2),
      p.kv_cache.stride(0),
      p.kv_cache.stride(1),
      p.kv_cache.stride(2),
      p.kv_cache.stride(3)};
  const std::int64_t work = p.q.size(1) * num_pairs + p.k.size(1) * (p.k.size(2) - num_pairs) +
                            p.v.size(1) * p.v.size(2);  // of one token
  if (work == 0) return;
  FASTGPT_CHECK(work <= 65535LL * kThreads, "a token has ", work, " pairs and elements in ",
                p.q.size(1) + p.k.size(1) + p.v.size(1), " heads; expected at most ",
                65535LL * kThreads);
  const dim3 grid(unsigned(p.q.size(0)), unsigned((work + kThreads - 1) / kThreads));
  device::dispatch_float(p.q.dtype, [&](auto tag) {
    device::launch(rotary_write_kv_kernel<decltype(tag)>, grid, kThreads, 0,
                   static_cast<cudaStream_t>(stream.handle), args);
  });
}

}  // namespace fastgpt::kv_cache
