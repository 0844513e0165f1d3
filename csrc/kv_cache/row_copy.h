// Storing one row of a new key or value, converted to the cache's dtype or quantized.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "fastgpt/dispatch.h"
#include "fastgpt/fp8.h"
#include "fastgpt/kv_format.h"

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

/// The codes of one row; returns their scale.
template <class T>
float quantize_row(const T* x, DType dtype, void* codes, std::int64_t width) {
  float amax = 0.0F;
  bool is_finite = true;
  for (std::int64_t i = 0; i < width; ++i) {
    const float magnitude = std::fabs(to_float(x[i]));
    is_finite = is_finite && magnitude <= std::numeric_limits<float>::max();
    amax = std::max(amax, magnitude);
  }
  const float largest = dtype == DType::kU8 ? kFp8Largest : kInt8Largest;
  float scale = amax / largest;
  if (!(scale > 0.0F)) scale = 1.0F;
  if (!is_finite) {
    std::memset(codes, 0, std::size_t(width));
    return std::numeric_limits<float>::quiet_NaN();
  }
  for (std::int64_t i = 0; i < width; ++i) {
    const float code = std::clamp(to_float(x[i]) / scale, -largest, largest);
    if (dtype == DType::kU8) {
      static_cast<Fp8*>(codes)[i] = from_float<Fp8>(code);
    } else {
      static_cast<std::int8_t*>(codes)[i] = std::int8_t(std::nearbyint(code));
    }
  }
  return scale;
}

/// Call fn with the element types of x and of a floating cache, as (T{}, C{}).
template <class Fn>
void dispatch_row(DType dtype, DType cache_dtype, Fn&& fn) {
  dispatch_float(dtype, [&](auto tag) {
    dispatch_float(cache_dtype, [&](auto cache_tag) { fn(tag, cache_tag); });
  });
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
