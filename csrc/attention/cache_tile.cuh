// Products of 16 query rows with a tile of cached rows in shared memory, whatever the rows are made
// of: the type T of the queries, or codes of a byte, which become T on the way to the tensor cores.
//
// ldmatrix moves pairs of bytes, and a pair of codes is two columns where a T is one. A word of
// four codes c0 c1 c2 c3 expands to the pairs (c0, c2) and (c1, c3) in the fewest instructions, so:
//
//   keys:    a product may take its columns in any order: queries are loaded in the order of the
//            pairs, columns 4t, 4t + 2 | 4t + 1, 4t + 3 of 16 where a T has 2t, 2t + 1 | + 8, + 9
//   values:  transposed, the word holds columns 2g and 2g + 1 of two keys: one product yields the
//            even columns of 16, the next the odd ones, and a thread ends with four neighbours
#pragma once
#include "attention/paged.cuh"
#include "device/dequant.cuh"
#include "fastgpt/fp8.h"

namespace fastgpt::attention {

/// Whether a cache of C holds codes: Fp8 or std::int8_t.
template <class C>
inline constexpr bool kIsCode = sizeof(C) == 1;

/// 16-bit columns of a row of kDim elements: what copies and ldmatrix count.
template <class C, int kDim>
inline constexpr int kWidth16 = kDim * int(sizeof(C)) / 2;

/// Factors beside the scales. dequant_fp8 yields float16 divided by 256. A probability times a
/// scale of int8 values would leave float16's normal range; with 64 it stays as far inside as the
/// probability is, and outputs are divided by it.
template <class T, class C>
inline constexpr float kKeyUnit = 1.0F;
template <>
inline constexpr float kKeyUnit<__half, Fp8> = device::kFp8Unit<__half>;
template <class T, class C>
inline constexpr float kValueUnit = 1.0F;
template <>
inline constexpr float kValueUnit<__half, Fp8> = device::kFp8Unit<__half>;
template <>
inline constexpr float kValueUnit<__half, std::int8_t> = 64.0F;
template <class T, class C>
inline constexpr float kOutUnit = 1.0F;
template <>
inline constexpr float kOutUnit<__half, std::int8_t> = 1.0F / 64.0F;

/// Copy one scale to shared memory, or zero if !valid (source is then not read), asynchronously as
/// device::copy_async_16. PTX ISA 9.7.9.25.3.1, cp.async.
__device__ inline void copy_scale_async(float* target, const float* source, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(device::shared_address(target)),
               "l"(source), "r"(valid ? 4 : 0)
               : "memory");
#else
  *target = valid ? *source : 0.0F;
#endif
}

/// Host: call fn with the types of queries and cache, as (T{}, C{}).
template <class Fn>
void dispatch_cache(DType dtype, DType cache_dtype, Fn&& fn) {
  const auto with_queries = [&](auto tag) {
    if (cache_dtype == DType::kU8) return fn(tag, Fp8{});
    if (cache_dtype == DType::kI8) return fn(tag, std::int8_t{});
    fn(tag, tag);
  };
  if (dtype == DType::kF16) return with_queries(__half{});
  with_queries(__nv_bfloat16{});
}

/// A word of codes c0 c1 c2 c3 to (c0, c2) and (c1, c3), exact but for kKeyUnit.
template <class T, class C>
__device__ inline void expand_codes(std::uint32_t word, std::uint32_t& even, std::uint32_t& odd) {
  if constexpr (sizeof(C) != 1) {
    even = odd = word;  // not reached
  } else if constexpr (std::is_same_v<C, Fp8>) {
    device::dequant_fp8<T>(word, even, odd);
  } else {
    device::dequant_int8<T>(word, even, odd);
  }
}

/// Columns first .. first + 16 kSteps - 1 of two query rows as A fragments; zero from `width` on.
template <class T, class C, int kSteps>
__device__ inline void load_query_fragments(std::uint32_t (&q)[kSteps][4],
                                            const T* const (&rows)[2], int first, int width) {
  const int lane = int(threadIdx.x % 32);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int column = first + k * 16;
      if constexpr (kIsCode<C>) {
        const std::uint32_t low = load_query_pair(rows[r], column + lane % 4 * 4, width);
        const std::uint32_t high = load_query_pair(rows[r], column + lane % 4 * 4 + 2, width);
        q[k][r] = __byte_perm(low, high, 0x5410);
        q[k][r + 2] = __byte_perm(low, high, 0x7632);
      } else {
        q[k][r] = load_query_pair(rows[r], column + lane % 4 * 2, width);
        q[k][r + 2] = load_query_pair(rows[r], column + lane % 4 * 2 + 8, width);
      }
    }
  }
}

/// s[n] += q k^T for keys 8 n .. 8 n + 7 of a tile with kWidth 16-bit columns, over the columns of
/// q that lie from 16-byte chunk first_chunk on.
template <class T, class C, int kWidth, int kSteps, int kTiles>
__device__ inline void add_scores(float (&s)[kTiles][4], const std::uint32_t (&q)[kSteps][4],
                                  const void* tile, int first_chunk) {
  constexpr int kLoads = kSteps * (kIsCode<C> ? 1 : 2) / 2;  // of 32 bytes a row
  static_assert(kTiles % 2 == 0 && (!kIsCode<C> || kSteps % 2 == 0));
  const int lane = int(threadIdx.x % 32);
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      std::uint32_t b[4];
      device::load_matrix_x4(
          b, device::shared_address(static_cast<const std::uint16_t*>(tile) +
                                    tile_index<kWidth>(n * 8 + (lane & 7) + ((lane >> 4) << 3),
                                                       first_chunk + k * 2 + ((lane >> 3) & 1))));
      if constexpr (kIsCode<C>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          std::uint32_t even;
          std::uint32_t odd;
          expand_codes<T, C>(b[i], even, odd);
          device::mma_m16n8k16<T>(s[n + i / 2], q[2 * k + i % 2], even, odd);
        }
      } else {
        device::mma_m16n8k16<T>(s[n], q[k], b[0], b[1]);
        device::mma_m16n8k16<T>(s[n + 1], q[k], b[2], b[3]);
      }
    }
  }
}

/// out += p v for keys first_key .. first_key + 15 and as many columns as out has, from 16-byte
/// chunk first_chunk on. Fragment n of out is columns 8 n + 2 t, + 1; of codes, fragments 2 n and 2
/// n + 1 are the even and the odd ones of columns 16 n + 4 t .. 16 n + 4 t + 3.
template <class T, class C, int kWidth, int kFragments>
__device__ inline void add_outputs(float (&out)[kFragments][4], const std::uint32_t (&p)[4],
                                   const void* tile, int first_key, int first_chunk) {
  const int lane = int(threadIdx.x % 32);
  constexpr int kLoads = kFragments / (kIsCode<C> ? 4 : 2);
#pragma unroll
  for (int n = 0; n < kLoads; ++n) {
    std::uint32_t b[4];
    device::load_matrix_x4_transposed(
        b, device::shared_address(
               static_cast<const std::uint16_t*>(tile) +
               tile_index<kWidth>(first_key + (lane & 15), first_chunk + n * 2 + (lane >> 4))));
    if constexpr (kIsCode<C>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        std::uint32_t even[2];
        std::uint32_t odd[2];
        expand_codes<T, C>(b[2 * i], even[0], odd[0]);
        expand_codes<T, C>(b[2 * i + 1], even[1], odd[1]);
        device::mma_m16n8k16<T>(out[4 * n + 2 * i], p, even[0], even[1]);
        device::mma_m16n8k16<T>(out[4 * n + 2 * i + 1], p, odd[0], odd[1]);
      }
    } else {
      device::mma_m16n8k16<T>(out[2 * n], p, b[0], b[1]);
      device::mma_m16n8k16<T>(out[2 * n + 1], p, b[2], b[3]);
    }
  }
}

/// Call fn(column, values) with runs of neighbouring columns that this thread holds of row half r:
/// two of T, four of codes, first those of fragment 0.
template <class C, int kFragments, class Fn>
__device__ inline void for_each_run_of_row(const float (&out)[kFragments][4], int r, Fn&& fn) {
  const int lane = int(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < kFragments; n += kIsCode<C> ? 2 : 1) {
    if constexpr (kIsCode<C>) {
      const float values[4] = {out[n][2 * r], out[n + 1][2 * r], out[n][2 * r + 1],
                               out[n + 1][2 * r + 1]};
      fn(n * 8 + lane % 4 * 4, values);
    } else {
      const float values[2] = {out[n][2 * r], out[n][2 * r + 1]};
      fn(n * 8 + lane % 4 * 2, values);
    }
  }
}

/// Multiply columns 8 n + 2 t, + 1 of s by what stands at those keys in shared memory, kStride
/// floats a key.
template <int kStride, int kTiles>
__device__ inline void scale_columns(float (&s)[kTiles][4], const float* scale, float unit) {
  const int column = int(threadIdx.x % 4) * 2;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float* pair = scale + (n * 8 + column) * kStride;
    const float factor[2] = {pair[0] * unit, pair[kStride] * unit};
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] *= factor[e % 2];
  }
}

}  // namespace fastgpt::attention
