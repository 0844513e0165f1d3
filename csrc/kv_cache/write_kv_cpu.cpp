#include "fastgpt/dispatch.h"
#include "fastgpt/thread_pool.h"
#include "kv_cache/kernels.h"
#include "kv_cache/row_copy.h"

namespace fastgpt::kv_cache {
namespace {

template <class T, class C>
void write_token(const WriteKvParams& p, std::int64_t token) {
  const std::int64_t slot = p.slot_mapping.as<std::int64_t>()[token];
  if (slot < 0) return;
  const std::int64_t block_size = p.kv_cache.size(2);
  C* keys = p.kv_cache.as<C>() + slot / block_size * p.kv_cache.stride(0) +
            slot % block_size * p.kv_cache.stride(2);
  C* values = keys + p.kv_cache.stride(1);
  for (std::int64_t head = 0; head < p.k.size(1); ++head) {
    store_row(p.k.as<T>() + token * p.k.stride(0) + head * p.k.stride(1),
              keys + head * p.kv_cache.stride(3), p.k.size(2));
    store_row(p.v.as<T>() + token * p.v.stride(0) + head * p.v.stride(1),
              values + head * p.kv_cache.stride(3), p.v.size(2));
  }
}

}  // namespace

void write_kv_cpu(const WriteKvParams& p) {
  check_slots(p.slot_mapping, p.kv_cache.size(0) * p.kv_cache.size(2));
  const std::int64_t width = p.k.size(1) * (p.k.size(2) + p.v.size(2));
  dispatch_float(p.k.dtype, [&](auto tag) {
    dispatch_float(p.kv_cache.dtype, [&](auto cache_tag) {
      using T = decltype(tag);
      using C = decltype(cache_tag);
      parallel_for(0, p.k.size(0), 1 + kGrainElements / (width + 1),
                   [&](std::int64_t a, std::int64_t b) {
                     for (std::int64_t i = a; i < b; ++i) write_token<T, C>(p, i);
                   });
    });
  });
}

}  // namespace fastgpt::kv_cache
