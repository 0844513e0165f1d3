#include "fastgpt/thread_pool.h"
#include "kv_cache/kernels.h"
#include "kv_cache/row_copy.h"

namespace fastgpt::kv_cache {
namespace {

/// Call fn(token, block, offset) for every token that has a slot; threads share the tokens.
template <class Fn>
void for_each_stored(const WriteMlaParams& p, Fn&& fn) {
  const std::int64_t block_size = p.kv_cache.size(1);
  const std::int64_t width = p.kv_latent.size(1) + p.k_pe.size(1);
  parallel_for(0, p.kv_latent.size(0), 1 + kGrainElements / (width + 1),
               [&](std::int64_t a, std::int64_t b) {
                 for (std::int64_t token = a; token < b; ++token) {
                   const std::int64_t slot = p.slot_mapping.as<std::int64_t>()[token];
                   if (slot >= 0) fn(token, slot / block_size, slot % block_size);
                 }
               });
}

/// The row of one slot in a cache [num_blocks, block_size, width].
template <class C>
C* slot_row(const TensorView& cache, std::int64_t block, std::int64_t offset) {
  return cache.as<C>() + block * cache.stride(0) + offset * cache.stride(1);
}

template <class T, class C>
void write_codes(const WriteMlaParams& p) {
  const std::int64_t latent = p.kv_latent.size(1);
  for_each_stored(p, [&](std::int64_t token, std::int64_t block, std::int64_t offset) {
    const T* x = p.kv_latent.as<T>() + token * p.kv_latent.stride(0);
    std::uint8_t* codes = slot_row<std::uint8_t>(p.kv_cache, block, offset);
    float* scale = slot_row<float>(p.kv_scale, block, offset);
    for (std::int64_t first = 0; first < latent; first += kLatentGroup) {
      scale[first / kLatentGroup] = quantize_row(x + first, p.kv_cache.dtype, codes + first,
                                                 std::min(kLatentGroup, latent - first));
    }
    store_row(p.k_pe.as<T>() + token * p.k_pe.stride(0), slot_row<C>(p.pe_cache, block, offset),
              p.k_pe.size(1));
  });
}

template <class T, class C>
void write_rows(const WriteMlaParams& p) {
  const std::int64_t latent = p.kv_latent.size(1);
  for_each_stored(p, [&](std::int64_t token, std::int64_t block, std::int64_t offset) {
    C* row = slot_row<C>(p.kv_cache, block, offset);
    store_row(p.kv_latent.as<T>() + token * p.kv_latent.stride(0), row, latent);
    store_row(p.k_pe.as<T>() + token * p.k_pe.stride(0), row + latent, p.k_pe.size(1));
  });
}

}  // namespace

void write_mla_cpu(const WriteMlaParams& p) {
  check_slots(p.slot_mapping, p.kv_cache.size(0) * p.kv_cache.size(1));
  const bool has_codes = is_code(p.kv_cache.dtype);
  const DType cache_dtype = has_codes ? p.pe_cache.dtype : p.kv_cache.dtype;
  dispatch_row(p.kv_latent.dtype, cache_dtype, [&](auto tag, auto cache_tag) {
    using T = decltype(tag);
    using C = decltype(cache_tag);
    if (has_codes) {
      write_codes<T, C>(p);
    } else {
      write_rows<T, C>(p);
    }
  });
}

}  // namespace fastgpt::kv_cache
