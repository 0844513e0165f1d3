// Codes to 16-bit floating point in registers, without tables: the bits of a code become mantissa
// and exponent bits of the target type.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "device/ptx.cuh"

namespace fastgpt::device {

__device__ inline std::uint32_t bits_of(__half2 x) { return *reinterpret_cast<std::uint32_t*>(&x); }
__device__ inline __half2 half2_of(std::uint32_t x) { return *reinterpret_cast<__half2*>(&x); }

/// What is subtracted from the raw form of an int4 code: the zero point in the terms of the type.
template <class T>
struct Int4Zero;

/// float16: a nibble in the low mantissa bits under the exponent of 1024 reads 1024 + code; four
/// bits higher it reads 1024 + 16 code, one fma away from 64 + code.
template <>
struct Int4Zero<__half> {
  std::uint32_t low, high;  // -(1024 + zero_point), -(64 + zero_point), twice each
  __device__ explicit Int4Zero(int zero_point)
      : low((0xE400U + unsigned(zero_point)) * 0x10001U),
        high((0xD400U + (unsigned(zero_point) << 4)) * 0x10001U) {}
};

/// bfloat16: seven mantissa bits hold a nibble only in their low end: 128 + code.
template <>
struct Int4Zero<__nv_bfloat16> {
  std::uint32_t low;  // -(128 + zero_point), twice
  __device__ explicit Int4Zero(int zero_point) : low((0xC300U + unsigned(zero_point)) * 0x10001U) {}
};

/// Eight int4 codes of one word to code - zero_point, exact: columns (0,1) (2,3) (4,5) (6,7).
/// Nibbles from low to high hold columns 0 2 4 6 1 3 5 7, so every mask yields a pair.
__device__ inline void dequant_int4(std::uint32_t word, Int4Zero<__half> zero,
                                    std::uint32_t (&pairs)[4]) {
  const __half2 sixteenth = half2_of(0x2C002C00U);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t low = and_or<0x000F000FU, 0x64006400U>(word);
    const std::uint32_t high = and_or<0x00F000F0U, 0x64006400U>(word);
    pairs[2 * i] = bits_of(__hadd2(half2_of(low), half2_of(zero.low)));
    pairs[2 * i + 1] = bits_of(__hfma2(half2_of(high), sixteenth, half2_of(zero.high)));
    word >>= 8;
  }
}

__device__ inline void dequant_int4(std::uint32_t word, Int4Zero<__nv_bfloat16> zero,
                                    std::uint32_t (&pairs)[4]) {
  constexpr std::uint32_t kOne = 0x3F803F80U;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t raw = and_or<0x000F000FU, 0x43004300U>(word);
    pairs[i] = fma_bf16x2(raw, kOne, zero.low);
    word >>= 4;
  }
}

/// Four e4m3 codes of one word, bytes in column order 0 2 1 3, to columns (0,1) (2,3).
/// The exponent moves up as it is, so values come out divided by 2^8 in float16 (kFp8Unit undoes
/// it in the epilogue); bfloat16 multiplies by 2^120 here, because products near 2^-120 would fall
/// under float32's range. Subnormal codes become subnormal values: exact. The NaN codes 0x7F and
/// 0xFF read as 480.
template <class T>
inline constexpr float kFp8Unit = 1.0F;
template <>
inline constexpr float kFp8Unit<__half> = 256.0F;

template <class T>
__device__ void dequant_fp8(std::uint32_t word, std::uint32_t& pair0, std::uint32_t& pair1);

template <>
__device__ inline void dequant_fp8<__half>(std::uint32_t word, std::uint32_t& pair0,
                                           std::uint32_t& pair1) {
  const std::uint32_t even = word << 8;
  pair0 = (even & 0x80008000U) | ((even >> 1) & 0x3F803F80U);
  pair1 = (word & 0x80008000U) | ((word >> 1) & 0x3F803F80U);
}

template <>
__device__ inline void dequant_fp8<__nv_bfloat16>(std::uint32_t word, std::uint32_t& pair0,
                                                  std::uint32_t& pair1) {
  constexpr std::uint32_t kUnit = 0x7B807B80U;       // 2^120
  constexpr std::uint32_t kMinusZero = 0x80008000U;  // keeps the sign of a zero product
  const std::uint32_t even = word << 8;
  const std::uint32_t raw0 = (even & 0x80008000U) | ((even >> 4) & 0x07F007F0U);
  const std::uint32_t raw1 = (word & 0x80008000U) | ((word >> 4) & 0x07F007F0U);
  pair0 = fma_bf16x2(raw0, kUnit, kMinusZero);
  pair1 = fma_bf16x2(raw1, kUnit, kMinusZero);
}

/// Four int8 codes of one word, bytes in column order 0 2 1 3, to columns (0,1) (2,3), exact.
template <class T>
__device__ void dequant_int8(std::uint32_t word, std::uint32_t& pair0, std::uint32_t& pair1);

/// float16: the code with its sign bit flipped under the exponent of 1024 reads 1152 + code.
template <>
__device__ inline void dequant_int8<__half>(std::uint32_t word, std::uint32_t& pair0,
                                            std::uint32_t& pair1) {
  const __half2 zero = half2_of(0xE480E480U);  // -1152
  pair0 = bits_of(__hadd2(half2_of(and_xor<0x00FF00FFU, 0x64806480U>(word)), zero));
  pair1 = bits_of(__hadd2(half2_of(and_xor<0x00FF00FFU, 0x64806480U>(word >> 8)), zero));
}

/// bfloat16: under the exponent of 128 the low seven bits read 128 + bits; the sign bit alone turns
/// 128 into 256, so the difference of the two is bits - 128 sign.
template <>
__device__ inline void dequant_int8<__nv_bfloat16>(std::uint32_t word, std::uint32_t& pair0,
                                                   std::uint32_t& pair1) {
  constexpr std::uint32_t kMinusOne = 0xBF80BF80U;
  const std::uint32_t odd = word >> 8;
  pair0 = fma_bf16x2(and_or<0x00800080U, 0x43004300U>(word), kMinusOne,
                     and_or<0x007F007FU, 0x43004300U>(word));
  pair1 = fma_bf16x2(and_or<0x00800080U, 0x43004300U>(odd), kMinusOne,
                     and_or<0x007F007FU, 0x43004300U>(odd));
}

/// One e4m3 code to float, NaN included, and back (round to nearest even, saturating at 448).
__device__ inline float fp8_to_float(std::uint8_t code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}
__device__ inline std::uint8_t float_to_fp8(float x) {
  return std::uint8_t(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3));
}

}  // namespace fastgpt::device
