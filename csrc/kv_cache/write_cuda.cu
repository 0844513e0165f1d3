#include <cuda_runtime.h>

#include <algorithm>

#include "device/dependent.cuh"
#include "device/pack.cuh"
#include "fastgpt/check.h"
#include "fastgpt/kv_format.h"
#include "kv_cache/kernels.h"

namespace fastgpt::kv_cache {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kPack = 8;  // elements a thread moves at a time where rows are aligned

/// Rows of one source tensor and where they go inside a cache slot. Strides count elements.
struct Part {
  const void* source;
  std::int64_t token_stride;
  std::int64_t row_stride;
  std::int64_t cache_offset;  // of the part's first row from the slot's start
  std::int64_t cache_row_stride;
  int num_rows;
  int width;
};

struct CacheSlots {
  void* data;
  std::int64_t block_stride;
  std::int64_t slot_stride;
  std::int64_t block_size;
  std::int64_t num_blocks;
};

struct WriteArgs {
  Part first;
  Part second;
  DType dtype;
  const std::int64_t* slot_mapping;
  std::int64_t slot_mapping_stride;
  CacheSlots cache;
  DType cache_dtype;
};

// One CTA stores one token: keys and values, or latent and rope key, converted to the cache's
// dtype. A thread moves kSize elements at a time. Grid: num_tokens. A slot past the cache is
// skipped like a negative one: it must not corrupt a neighbour.
template <int kSize>
__global__ void __launch_bounds__(kMaxThreads)
    write_slots_kernel(const __grid_constant__ device::Dependent<WriteArgs> dependent) {
  const WriteArgs& args = dependent.wait();
  const Part& first = args.first;
  const Part& second = args.second;
  const CacheSlots& cache = args.cache;
  const std::int64_t token = blockIdx.x;
  const std::int64_t slot = args.slot_mapping[token * args.slot_mapping_stride];
  if (slot < 0 || slot >= cache.num_blocks * cache.block_size) return;
  const std::int64_t target =
      slot / cache.block_size * cache.block_stride + slot % cache.block_size * cache.slot_stride;
  const int first_packs = first.num_rows * (first.width / kSize);
  const int num_packs = first_packs + second.num_rows * (second.width / kSize);
  for (int p = int(threadIdx.x); p < num_packs; p += int(blockDim.x)) {
    const Part& part = p < first_packs ? first : second;
    const int index = (p < first_packs ? p : p - first_packs) * kSize;
    const std::int64_t row = index / part.width;
    const int column = index % part.width;
    float values[kSize];
    device::load_as_float<kSize>(part.source, args.dtype,
                                 token * part.token_stride + row * part.row_stride + column,
                                 values);
    device::store_from_float<kSize>(
        cache.data, args.cache_dtype,
        target + part.cache_offset + row * part.cache_row_stride + column, values);
  }
}

void launch(const Part& first, const Part& second, DType dtype, const TensorView& slot_mapping,
            const TensorView& kv_cache, int slot_dim, bool aligned, const Stream& stream) {
  const std::int64_t num_tokens = slot_mapping.size(0);
  const int elements = first.num_rows * first.width + second.num_rows * second.width;
  if (num_tokens == 0 || elements == 0) return;
  const CacheSlots cache{kv_cache.data, kv_cache.stride(0), kv_cache.stride(slot_dim),
                         kv_cache.size(slot_dim), kv_cache.size(0)};
  const int threads = std::min(kMaxThreads, (elements / (aligned ? kPack : 1) + 31) / 32 * 32);
  const auto kernel = aligned ? write_slots_kernel<kPack> : write_slots_kernel<1>;
  const WriteArgs args{
      first, second,        dtype, slot_mapping.as<std::int64_t>(), slot_mapping.stride(0),
      cache, kv_cache.dtype};
  device::launch(kernel, unsigned(num_tokens), unsigned(threads), 0,
                 static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace

void write_kv_cuda(const WriteKvParams& p, const Stream& stream) {
  if (is_code(p.kv_cache.dtype)) return write_codes_cuda(p, stream);
  const TensorView& c = p.kv_cache;
  const auto part = [&](const TensorView& source, std::int64_t offset) {
    return Part{source.data, source.stride(0),    source.stride(1),   offset,
                c.stride(3), int(source.size(1)), int(source.size(2))};
  };
  const bool aligned = device::rows_aligned(p.k, kPack) && device::rows_aligned(p.v, kPack) &&
                       device::rows_aligned(c, kPack);
  launch(part(p.k, 0), part(p.v, c.stride(1)), p.k.dtype, p.slot_mapping, c, 2, aligned, stream);
}

void write_mla_cuda(const WriteMlaParams& p, const Stream& stream) {
  if (is_code(p.kv_cache.dtype)) return write_latent_codes_cuda(p, stream);
  const auto part = [&](const TensorView& source, std::int64_t offset) {
    return Part{source.data, source.stride(0), 0, offset, 0, 1, int(source.size(1))};
  };
  const bool aligned = device::rows_aligned(p.kv_latent, kPack) &&
                       device::rows_aligned(p.k_pe, kPack) &&
                       device::rows_aligned(p.kv_cache, kPack);
  launch(part(p.kv_latent, 0), part(p.k_pe, p.kv_latent.size(1)), p.kv_latent.dtype, p.slot_mapping,
         p.kv_cache, 1, aligned, stream);
}

}  // namespace fastgpt::kv_cache
