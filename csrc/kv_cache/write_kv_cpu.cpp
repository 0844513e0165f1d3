#include "fastgpt/thread_pool.h"
#include "kv_cache/kernels.h"
#include "kv_cache/row_copy.h"

namespace fastgpt::kv_cache {
namespace {

/// Call fn(token, block, offset) for every token that has a slot; threads share the tokens.
template <class Fn>
void for_each_stored(const WriteKvParams& p, Fn&& fn) {
  const std::int64_t width = p.k.size(1) * (p.k.size(2) + p.v.size(2));
  const std::int64_t block_size = p.kv_cache.size(2);
  parallel_for(0, p.k.size(0), 1 + kGrainElements / (width + 1),
               [&](std::int64_t a, std::int64_t b) {
                 for (std::int64_t token = a; token < b; ++token) {
                   const std::int64_t slot = p.slot_mapping.as<std::int64_t>()[token];
                   if (slot >= 0) fn(token, slot / block_size, slot % block_size);
                 }
               });
}

/// Row (token, head) of k or v.
template <class T>
const T* source_row(const TensorView& x, std::int64_t token, std::int64_t head) {
  return x.as<T>() + token * x.stride(0) + head * x.stride(1);
}

template <class T>
void write_codes(const WriteKvParams& p) {
  const TensorView& cache = p.kv_cache;
  const TensorView& scale = p.kv_scale;
  for_each_stored(p, [&](std::int64_t token, std::int64_t block, std::int64_t offset) {
    for (int part = 0; part < 2; ++part) {
      const TensorView& x = part == 0 ? p.k : p.v;
      for (std::int64_t head = 0; head < x.size(1); ++head) {
        std::uint8_t* codes = cache.as<std::uint8_t>() + block * cache.stride(0) +
                              part * cache.stride(1) + offset * cache.stride(2) +
                              head * cache.stride(3);
        scale.as<float>()[block * scale.stride(0) + part * scale.stride(1) +
                          head * scale.stride(2) + offset] =
            quantize_row(source_row<T>(x, token, head), cache.dtype, codes, x.size(2));
      }
    }
  });
}

template <class T, class C>
void write_rows(const WriteKvParams& p) {
  const TensorView& cache = p.kv_cache;
  for_each_stored(p, [&](std::int64_t token, std::int64_t block, std::int64_t offset) {
    C* keys = cache.as<C>() + block * cache.stride(0) + offset * cache.stride(2);
    C* values = keys + cache.stride(1);
    for (std::int64_t head = 0; head < p.k.size(1); ++head) {
      store_row(source_row<T>(p.k, token, head), keys + head * cache.stride(3), p.k.size(2));
      store_row(source_row<T>(p.v, token, head), values + head * cache.stride(3), p.v.size(2));
    }
  });
}

}  // namespace

void write_kv_cpu(const WriteKvParams& p) {
  check_slots(p.slot_mapping, p.kv_cache.size(0) * p.kv_cache.size(2));
  if (is_code(p.kv_cache.dtype)) {
    return dispatch_float(p.k.dtype, [&](auto tag) { write_codes<decltype(tag)>(p); });
  }
  dispatch_row(p.k.dtype, p.kv_cache.dtype, [&](auto tag, auto cache_tag) {
    write_rows<decltype(tag), decltype(cache_tag)>(p);
  });
}

}  // namespace fastgpt::kv_cache
