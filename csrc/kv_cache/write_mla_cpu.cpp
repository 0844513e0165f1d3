#include "fastgpt/dispatch.h"
#include "fastgpt/thread_pool.h"
#include "kv_cache/kernels.h"
#include "kv_cache/row_copy.h"

namespace fastgpt::kv_cache {

void write_mla_cpu(const WriteMlaParams& p) {
  const std::int64_t block_size = p.kv_cache.size(1);
  const std::int64_t latent = p.kv_latent.size(1);
  check_slots(p.slot_mapping, p.kv_cache.size(0) * block_size);
  dispatch_float(p.kv_latent.dtype, [&](auto tag) {
    dispatch_float(p.kv_cache.dtype, [&](auto cache_tag) {
      using T = decltype(tag);
      using C = decltype(cache_tag);
      parallel_for(0, p.kv_latent.size(0), 1 + kGrainElements / (p.kv_cache.size(2) + 1),
                   [&](std::int64_t a, std::int64_t b) {
                     for (std::int64_t i = a; i < b; ++i) {
                       const std::int64_t slot = p.slot_mapping.as<std::int64_t>()[i];
                       if (slot < 0) continue;
                       C* row = p.kv_cache.as<C>() + slot / block_size * p.kv_cache.stride(0) +
                                slot % block_size * p.kv_cache.stride(1);
                       store_row(p.kv_latent.as<T>() + i * p.kv_latent.stride(0), row, latent);
                       store_row(p.k_pe.as<T>() + i * p.k_pe.stride(0), row + latent,
                                 p.k_pe.size(1));
                     }
                   });
    });
  });
}

}  // namespace fastgpt::kv_cache
