// The arithmetic of the draw (fastgpt/sampling.h), written once for host and device.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTGPT_HOST_DEVICE __host__ __device__
#else
#define FASTGPT_HOST_DEVICE
#endif

namespace fastgpt::sampling {

constexpr float kLog2E = 1.44269504F;
constexpr float kLowestExponent = -64.0F;    // y below this has weight 0
constexpr float kWeightOne = 1073741824.0F;  // 2^30, the weight of the likeliest token
constexpr int kTopPBits = 24;

/// exp2(y) for y <= 0, and 0 for y < -64 and NaN. On [-0.5, 0.5] exp2(f) is
/// c0 + f (c1 + f (c2 + ...)); error below 2e-7 (Cephes exp2f).
FASTGPT_HOST_DEVICE inline float exp2_of(float y) {
  if (!(y >= kLowestExponent)) return 0.0F;
  const float whole = rintf(y);
  const float f = y - whole;  // exact
  float p = 1.535336188319500e-4F;
  p = fmaf(p, f, 1.339887440266574e-3F);
  p = fmaf(p, f, 9.618437357674640e-3F);
  p = fmaf(p, f, 5.550332471162809e-2F);
  p = fmaf(p, f, 2.402264791363012e-1F);
  p = fmaf(p, f, 6.931472028550421e-1F);
  p = fmaf(p, f, 1.0F);
  return ldexpf(p, int(whole));  // exact
}

/// c of the definition: what turns a distance between logits into an exponent of 2.
FASTGPT_HOST_DEVICE inline float exponent_factor(float temperature) {
  return fminf(kLog2E / temperature, 3.402823466e38F);
}

/// The integer weight of a token whose exp2_of is e.
FASTGPT_HOST_DEVICE inline std::uint32_t token_weight(float e) {
  return std::uint32_t(rintf(e * kWeightOne));
}

/// The target of top-p: floor(sum * P / 2^24), at least 1. sum < 2^56.
FASTGPT_HOST_DEVICE inline std::uint64_t top_p_target(std::uint64_t sum, float top_p) {
  const std::uint64_t p = std::uint64_t(rintf(top_p * float(1 << kTopPBits)));
  const std::uint64_t low = sum & ((std::uint64_t(1) << kTopPBits) - 1);
  const std::uint64_t target = (sum >> kTopPBits) * p + ((low * p) >> kTopPBits);
  return target > 0 ? target : 1;
}

/// The upper 64 bits of a * b.
FASTGPT_HOST_DEVICE inline std::uint64_t multiply_high(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t a0 = a & 0xFFFFFFFFU;
  const std::uint64_t a1 = a >> 32;
  const std::uint64_t b0 = b & 0xFFFFFFFFU;
  const std::uint64_t b1 = b >> 32;
  const std::uint64_t middle = a1 * b0 + ((a0 * b0) >> 32);
  const std::uint64_t carry = a0 * b1 + (middle & 0xFFFFFFFFU);
  return a1 * b1 + (middle >> 32) + (carry >> 32);
}

/// 64 random bits of one (seed, position): words 1 and 0 of Philox4x32-10.
FASTGPT_HOST_DEVICE inline std::uint64_t random_bits(std::uint64_t seed, std::uint64_t position) {
  std::uint32_t key0 = std::uint32_t(seed);
  std::uint32_t key1 = std::uint32_t(seed >> 32);
  std::uint32_t c0 = std::uint32_t(position);
  std::uint32_t c1 = std::uint32_t(position >> 32);
  std::uint32_t c2 = 0;
  std::uint32_t c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t(0xD2511F53U) * c0;
    const std::uint64_t product1 = std::uint64_t(0xCD9E8D57U) * c2;
    c0 = std::uint32_t(product1 >> 32) ^ c1 ^ key0;
    c1 = std::uint32_t(product1);
    c2 = std::uint32_t(product0 >> 32) ^ c3 ^ key1;
    c3 = std::uint32_t(product0);
    key0 += 0x9E3779B9U;
    key1 += 0xBB67AE85U;
  }
  return std::uint64_t(c1) << 32 | c0;
}

}  // namespace fastgpt::sampling
