// float16 and bfloat16 storage on the host: conversions with round to nearest even, NaN kept.
#pragma once
#include <bit>
#include <cstdint>

namespace fastgpt {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return std::bit_cast<float>(std::uint32_t(x.bits) << 16); }

inline float to_float(Half x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000U) << 16;
  const std::uint32_t rest = x.bits & 0x7FFFU;
  if (rest >= 0x7C00U) return std::bit_cast<float>(sign | 0x7F800000U | (rest << 13));  // inf, NaN
  // Shifting the exponent by multiplication also handles subnormals.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112F;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return {std::uint16_t((bits >> 16) | 0x40U)};
  return {std::uint16_t((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000U);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return {std::uint16_t(sign | 0x7E00U)};
  if (magnitude >= 0x477FF000U) return {std::uint16_t(sign | 0x7C00U)};  // rounds to infinity
  if (magnitude < 0x38800000U) {  // subnormal: let the adder round at the right bit
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    return {std::uint16_t(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000U))};
  }
  const std::uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13) & 1U);
  return {std::uint16_t(sign | ((rounded - 0x38000000U) >> 13))};
}

}  // namespace fastgpt
