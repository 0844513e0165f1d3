// e4m3fn storage on the host: four exponent bits, three of mantissa, no infinities; 0x7F is NaN.
#pragma once
#include <bit>
#include <cstdint>
#include <limits>

#include "fastgpt/half.h"

namespace fastgpt {

inline constexpr float kFp8Largest = 448.0F;   // largest finite e4m3fn
inline constexpr float kInt8Largest = 127.0F;  // of the codes that symmetric quantizing gives

struct Fp8 {
  std::uint8_t bits;
};

inline float to_float(std::int8_t x) { return float(x); }

inline float to_float(Fp8 x) {
  const unsigned magnitude = x.bits & 0x7FU;
  const float value = magnitude == 0x7FU ? std::numeric_limits<float>::quiet_NaN()
                      : magnitude < 8U   ? float(magnitude) * 0x1p-9F
                                         : std::bit_cast<float>((magnitude << 20) + (120U << 23));
  return (x.bits & 0x80U) != 0 ? -value : value;
}

/// Round to nearest even; |x| <= 448.
template <>
inline Fp8 from_float<Fp8>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint8_t sign = std::uint8_t(bits >> 24 & 0x80U);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude < 0x3C800000U) {  // below 2^-6: steps of 2^-9; the adder rounds at that bit
    const float shifted = std::bit_cast<float>(magnitude) + 0x1p14F;  // 2^14 has ulp 2^-9
    return {std::uint8_t(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x46800000U))};
  }
  const std::uint32_t rounded = magnitude + 0x7FFFFU + (magnitude >> 20 & 1U);
  return {std::uint8_t(sign | ((rounded >> 20) - (120U << 3)))};
}

}  // namespace fastgpt
