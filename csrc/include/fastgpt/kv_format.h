// What the rows of a paged cache are: floating point, or codes with their scales beside them.
//
//     x = code * scale       uint8: e4m3fn, scale = amax / 448;   int8: scale = amax / 127
//
// A scale belongs to one token and one key or value head; with latent attention, to one token and
// 128 columns of its latent, and the rotary columns stay floating point in a cache of their own. It
// is computed when the token is written, so later tokens never change it. A row of zeros has scale
// 1; a row with a NaN or an infinity has scale NaN, so that it is NaN wherever it is read.
#pragma once
#include "fastgpt/tensor_check.h"

namespace fastgpt {

inline constexpr std::int64_t kLatentGroup = 128;  // columns of a latent row that share a scale

constexpr bool is_code(DType dtype) { return dtype == DType::kU8 || dtype == DType::kI8; }

constexpr std::int64_t num_latent_groups(std::int64_t latent) {
  return (latent + kLatentGroup - 1) / kLatentGroup;
}

/// kv_scale is there if and only if kv_cache holds codes.
inline void check_kv_dtype(const TensorView& kv_cache, const TensorView& kv_scale) {
  FASTGPT_CHECK(is_floating(kv_cache.dtype) || is_code(kv_cache.dtype), "kv_cache is ",
                dtype_name(kv_cache.dtype),
                "; expected float32, float16, bfloat16, or codes: uint8 (fp8 e4m3) or int8");
  if (is_code(kv_cache.dtype)) {
    FASTGPT_CHECK(kv_scale.defined, "kv_cache holds ", dtype_name(kv_cache.dtype),
                  " codes and kv_scale is missing; pass the float32 scales of its rows");
    check_dtype(kv_scale, "kv_scale", DType::kF32);
  } else {
    FASTGPT_CHECK(!kv_scale.defined, "kv_scale is given and kv_cache is ",
                  dtype_name(kv_cache.dtype), "; only uint8 and int8 codes have scales");
  }
}

/// The scales of keys and values per head: float32 [num_blocks, 2, num_kv_heads, block_size].
inline void check_kv_scale(const TensorView& kv_cache, const TensorView& kv_scale) {
  check_kv_dtype(kv_cache, kv_scale);
  if (!kv_scale) return;
  FASTGPT_CHECK_TENSOR(kv_scale, "kv_scale", 4);
  check_size(kv_scale, "kv_scale", 0, kv_cache.size(0), "the blocks of kv_cache");
  check_size(kv_scale, "kv_scale", 1, 2, "keys and values");
  check_size(kv_scale, "kv_scale", 2, kv_cache.size(3), "the heads of kv_cache");
  check_size(kv_scale, "kv_scale", 3, kv_cache.size(2), "the block size of kv_cache");
}

/// The scales of latent codes, float32 [num_blocks, block_size, ceil(latent / 128)], and the rotary
/// columns beside them, [num_blocks, block_size, rope]: both are there if and only if kv_cache
/// holds codes.
inline void check_latent_scale(const TensorView& kv_cache, const TensorView& kv_scale,
                               const TensorView& pe_cache) {
  check_kv_dtype(kv_cache, kv_scale);
  FASTGPT_CHECK(pe_cache.defined == kv_scale.defined, "pe_cache is ",
                pe_cache.defined ? "given" : "missing", " and kv_cache is ",
                dtype_name(kv_cache.dtype),
                "; codes have the rotary columns beside them, a floating cache in its rows");
  if (!kv_scale) return;
  FASTGPT_CHECK_TENSOR(kv_scale, "kv_scale", 3);
  FASTGPT_CHECK_TENSOR(pe_cache, "pe_cache", 3);
  check_floating(pe_cache, "pe_cache");
  for (int dim = 0; dim < 2; ++dim) {
    const char* meaning = dim == 0 ? "the blocks of kv_cache" : "the block size of kv_cache";
    check_size(kv_scale, "kv_scale", dim, kv_cache.size(dim), meaning);
    check_size(pe_cache, "pe_cache", dim, kv_cache.size(dim), meaning);
  }
  check_size(kv_scale, "kv_scale", 2, num_latent_groups(kv_cache.size(2)),
             "one per 128 columns of kv_cache");
}

}  // namespace fastgpt
