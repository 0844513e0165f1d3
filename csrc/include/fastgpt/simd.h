// A vector of floats, written once and compiled per instruction set: a file named *_avx512.cpp sees
// 16 lanes, *_avx2.cpp and any other file 8. Loads and stores convert from and to float16 and
// bfloat16 (round to nearest even, NaN kept); loads also from e4m3 and int8 codes, which are finite
// (the NaN code of e4m3 may read as 480).
//
// Everything here has internal linkage, and files compiled for an instruction set must call nothing
// inline from elsewhere (std::min, half.h, FASTGPT_CHECK): the linker keeps one copy of an inline
// function, and it could be one that an older processor cannot run.
#pragma once
#include <cstdint>

#include "fastgpt/fp8.h"
#include "fastgpt/half.h"
#include "fastgpt/tensor_view.h"

#ifdef __AVX2__
#ifndef __clang__
// GCC 12 takes the "undefined" operands of its own intrinsics for uninitialized variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace fastgpt::simd {
namespace {

#if defined(__AVX512F__)

constexpr int kWidth = 16;
struct Vec {
  __m512 v;
};

inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^a for whole numbers in -127 (gives 0) .. 127.
inline Vec power_of_two(Vec a) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
// a where x >= y, else 0.
inline Vec keep_if_at_least(Vec a, Vec x, Vec y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ), a.v)};
}
// Round to integers, store them, and return their sum.
inline std::uint64_t store_integers(std::uint32_t* p, Vec a) {
  const __m512i integers = _mm512_cvtps_epi32(a.v);
  _mm512_storeu_si512(p, integers);
  const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(integers));
  const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(integers, 1));
  return std::uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
}

inline __mmask16 first_lanes(int n) { return __mmask16((1U << n) - 1U); }
inline Vec widen(__m256i bits, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(__m256i bits, Half) { return {_mm512_cvtph_ps(bits)}; }
inline __m256i narrow(Vec a, BFloat16) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}
inline __m256i narrow(Vec a, Half) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
template <class T>
inline Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
inline Vec load(const std::int8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))};
}
// An e4m3 code one bit below its sign is a float16 with an exponent too small by 8.
inline Vec load(const Fp8* p) {
  const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(codes, 7), 15);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0x7F)), 7);
  return Vec{_mm512_cvtph_ps(_mm256_or_si256(sign, rest))} * set1(256.0F);
}
template <class T>
inline Vec load(const T* p, int n) {
  if constexpr (sizeof(T) == 1) {
    T lanes[kWidth] = {};
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), _mm_maskz_loadu_epi8(first_lanes(n), p));
    return load(lanes);
  } else {
    return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T{});
  }
}
template <class T>
inline void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
inline void store(T* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a, T{}));
}

inline __m256 fold(Vec a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
inline float max_of(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

constexpr int kWidth = 8;
struct Vec {
  __m256 v;
};

inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec power_of_two(Vec a) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(a.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))};
}
inline Vec keep_if_at_least(Vec a, Vec x, Vec y) {
  return {_mm256_and_ps(a.v, _mm256_cmp_ps(x.v, y.v, _CMP_GE_OQ))};
}
inline std::uint64_t store_integers(std::uint32_t* p, Vec a) {
  const __m256i integers = _mm256_cvtps_epi32(a.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), integers);
  const __m256i sums =
      _mm256_add_epi64(_mm256_cvtepu32_epi64(_mm256_castsi256_si128(integers)),
                       _mm256_cvtepu32_epi64(_mm256_extracti128_si256(integers, 1)));
  const __m128i pair =
      _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return std::uint64_t(_mm_extract_epi64(pair, 0)) + std::uint64_t(_mm_extract_epi64(pair, 1));
}

inline Vec widen(__m128i bits, BFloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(__m128i bits, Half) { return {_mm256_cvtph_ps(bits)}; }
inline __m128i narrow(Vec a, BFloat16) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}
inline __m128i narrow(Vec a, Half) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }
template <class T>
inline Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
inline Vec load(const std::int8_t* p) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))};
}
inline Vec load(const Fp8* p) {
  const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i sign = _mm_slli_epi16(_mm_srli_epi16(codes, 7), 15);
  const __m128i rest = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x7F)), 7);
  return Vec{_mm256_cvtph_ps(_mm_or_si128(sign, rest))} * set1(256.0F);
}
template <class T>
inline Vec load(const T* p, int n) {
  T lanes[kWidth] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
inline void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
template <class T>
inline void store(T* p, Vec a, int n) {
  T lanes[kWidth];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

inline __m256 fold(Vec a) { return a.v; }
inline float max_of(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

#else

constexpr int kWidth = 8;
struct Vec {
  float v[kWidth];
};

// One result per lane; the compiler turns the loop into SSE2.
template <class Fn>
inline Vec each(Fn&& fn) {
  Vec result;
  for (int i = 0; i < kWidth; ++i) result.v[i] = fn(i);
  return result;
}
inline Vec set1(float x) {
  return each([&](int) { return x; });
}
inline Vec operator+(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
// Rounds twice: SSE2 has no fused multiply-add. What needs the exact one says so.
inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// For |a| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
inline Vec round(Vec a) {
  return each([&](int i) { return (a.v[i] + 12582912.0F) - 12582912.0F; });
}
inline Vec power_of_two(Vec a) {
  return each([&](int i) {
    const int exponent = a.v[i] == a.v[i] ? int(a.v[i]) + 127 : 127;
    return std::bit_cast<float>(exponent << 23);
  });
}

template <class T>
inline Vec load(const T* p) {
  return each([&](int i) { return to_float(p[i]); });
}
template <class T>
inline Vec load(const T* p, int n) {
  return each([&](int i) { return i < n ? to_float(p[i]) : 0.0F; });
}
template <class T>
inline void store(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}
template <class T>
inline void store(T* p, Vec a) {
  store(p, a, kWidth);
}
inline float max_of(Vec a) {
  float largest = a.v[0];
  for (int i = 1; i < kWidth; ++i) largest = largest > a.v[i] ? largest : a.v[i];
  return largest;
}

#endif

#ifdef __AVX2__
/// The sum of the lanes, in the order that sum_of(a, b, c, d) uses too.
inline float sum_of(Vec a) {
  const __m256 x = fold(a);
  __m256 y = _mm256_hadd_ps(x, x);
  y = _mm256_hadd_ps(y, y);
  return _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
}
/// Four sums at once, stored in out: half the shuffles of four single ones.
inline void sum_of(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m256 x = _mm256_hadd_ps(fold(a), fold(b));
  const __m256 y = _mm256_hadd_ps(fold(c), fold(d));
  const __m256 z = _mm256_hadd_ps(x, y);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1)));
}
#else
inline float sum_of(Vec a) {
  return ((a.v[0] + a.v[1]) + (a.v[2] + a.v[3])) + ((a.v[4] + a.v[5]) + (a.v[6] + a.v[7]));
}
inline void sum_of(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = sum_of(a);
  out[1] = sum_of(b);
  out[2] = sum_of(c);
  out[3] = sum_of(d);
}
#endif

/// 2^x with an error of 2e-7 of it; 0 below -126.5, at most 2^126, NaN for NaN.
/// Polynomial: Cephes exp2f.
inline Vec exp2(Vec x) {
  x = min(set1(126.0F), max(set1(-127.0F), x));
  const Vec whole = round(x);
  const Vec f = x - whole;
  Vec p = set1(1.535336188319500e-4F);
  p = fma(p, f, set1(1.339887440266574e-3F));
  p = fma(p, f, set1(9.618437357674640e-3F));
  p = fma(p, f, set1(5.550332471162809e-2F));
  p = fma(p, f, set1(2.402264791363012e-1F));
  p = fma(p, f, set1(6.931472028550421e-1F));
  p = fma(p, f, set1(1.0F));
  return p * power_of_two(whole);
}

/// x / (1 + e^-x).
inline Vec silu(Vec x) { return x / (set1(1.0F) + exp2(x * set1(-1.44269504F))); }

/// Call fn(first, count) for runs of kWidth elements of n, the last one shorter.
template <class Fn>
inline void for_each_run(std::int64_t n, Fn&& fn) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) fn(i, kWidth);
  if (i < n) fn(i, int(n - i));
}
template <class T>
inline Vec load_run(const T* p, int n) {
  return n == kWidth ? load(p) : load(p, n);
}
template <class T>
inline void store_run(T* p, Vec a, int n) {
  if (n == kWidth) {
    store(p, a);
  } else {
    store(p, a, n);
  }
}

/// dispatch_float for files that may not use it: the dtype was checked before.
template <class Fn>
inline void with_float(DType dtype, Fn&& fn) {
  if (dtype == DType::kF32) {
    fn(float{});
  } else if (dtype == DType::kF16) {
    fn(Half{});
  } else {
    fn(BFloat16{});
  }
}

}  // namespace
}  // namespace fastgpt::simd
