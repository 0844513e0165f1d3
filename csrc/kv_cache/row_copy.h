// Storing one row of a new key or value, converted to the cache's dtype.
#pragma once
#include <cstring>
#include <type_traits>

#include "fastgpt/half.h"
#include "fastgpt/tensor_check.h"

namespace fastgpt::kv_cache {

constexpr std::int64_t kGrainElements = 16384;  // below this a thread costs more than it saves

template <class T, class C>
void store_row(const T* x, C* cache, std::int64_t width) {
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(cache, x, std::size_t(width) * sizeof(T));
  } else {
    for (std::int64_t i = 0; i < width; ++i) cache[i] = from_float<C>(to_float(x[i]));
  }
}

/// Every slot is negative (skipped) or inside the cache.
inline void check_slots(const TensorView& slot_mapping, std::int64_t num_slots) {
  const std::int64_t* slots = slot_mapping.as<std::int64_t>();
  for (std::int64_t i = 0; i < slot_mapping.size(0); ++i) {
    FASTGPT_CHECK(slots[i] < num_slots, "slot_mapping[", i, "] is ", slots[i], "; the cache has ",
                  num_slots, " slots");
  }
}

}  // namespace fastgpt::kv_cache
