// Warp-group products of eight-bit operands (wgmma, Hopper), both in shared memory: 32 columns an
// instruction, twice the rate of 16-bit ones. Sums lie in registers as wgmma.cuh says.
//
// e4m3 sums are float32 registers, but the tensor cores add with about 14 bits: what is summed up
// over many columns must move to other registers now and then (arXiv:2412.19437, section 3.3.2).
// int8 sums are int32 and exact. PTX ISA 9.7.15.5.2.
#pragma once
#include "device/wgmma.cuh"

namespace fastgpt::device {

/// Descriptor of an operand of 64-byte rows (64 columns), 16-byte chunks exchanged as TMA does
/// under 64-byte swizzling, tiles aligned to 512 bytes. The operand 32 columns further is at + 2.
/// PTX ISA 9.7.15.5.1.
__device__ inline std::uint64_t wgmma_operand_64(std::uint32_t shared_address) {
  constexpr std::uint64_t kSwizzle64 = std::uint64_t(2) << 62;
  constexpr std::uint64_t kEightRows = std::uint64_t(512 >> 4) << 32;
  return kSwizzle64 | kEightRows | std::uint64_t(1) << 16 | (shared_address & 0x3FFFF) >> 4;
}

#define FASTGPT_WGMMA_I8(i)                                                                   \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
      "+r"(d[i + 6]), "+r"(d[i + 7])
#define FASTGPT_WGMMA_I32(i) \
  FASTGPT_WGMMA_I8(i), FASTGPT_WGMMA_I8(i + 8), FASTGPT_WGMMA_I8(i + 16), FASTGPT_WGMMA_I8(i + 24)
#define FASTGPT_WGMMA_I64 FASTGPT_WGMMA_I32(0)
#define FASTGPT_WGMMA_I128 FASTGPT_WGMMA_I64, FASTGPT_WGMMA_I32(32)
#define FASTGPT_WGMMA_I192 FASTGPT_WGMMA_I128, FASTGPT_WGMMA_I32(64)
#define FASTGPT_WGMMA_I256 FASTGPT_WGMMA_I192, FASTGPT_WGMMA_I32(96)

// %i0 .. are the operands behind the N / 2 accumulators.
#define FASTGPT_WGMMA_E4M3(N, i0, i1, i2)                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N                           \
               "k32.f32.e4m3.e4m3 "                                             \
               " {" FASTGPT_WGMMA_D##N "}, %" #i0 ", %" #i1 ", %" #i2 ", 1, 1;" \
               : FASTGPT_WGMMA_F##N                                             \
               : "l"(a), "l"(b), "n"(int(kAdd)))
#define FASTGPT_WGMMA_S8(N, i0, i1, i2)                                   \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N                     \
               "k32.s32.s8.s8 "                                           \
               " {" FASTGPT_WGMMA_D##N "}, %" #i0 ", %" #i1 ", %" #i2 ";" \
               : FASTGPT_WGMMA_I##N                                       \
               : "l"(a), "l"(b), "n"(int(kAdd)))

/// d += a b^T of e4m3 codes (float sums) or int8 codes (int sums). Starts the product; d is valid
/// after wgmma_wait.
/// @tparam kAdd false: d = a b^T.
template <bool kAdd, int kHalf>
__device__ inline void wgmma_eight_bit(float (&d)[kHalf], std::uint64_t a, std::uint64_t b) {
#ifdef FASTGPT_HAS_WGMMA
  static_assert(kHalf == 32 || kHalf == 64 || kHalf == 96);
  if constexpr (kHalf == 32) {
    FASTGPT_WGMMA_E4M3(64, 32, 33, 34);
  } else if constexpr (kHalf == 64) {
    FASTGPT_WGMMA_E4M3(128, 64, 65, 66);
  } else {
    FASTGPT_WGMMA_E4M3(192, 96, 97, 98);
  }
#endif
}
template <bool kAdd, int kHalf>
__device__ inline void wgmma_eight_bit(int (&d)[kHalf], std::uint64_t a, std::uint64_t b) {
#ifdef FASTGPT_HAS_WGMMA
  static_assert(kHalf == 32 || kHalf == 64 || kHalf == 96 || kHalf == 128);
  if constexpr (kHalf == 32) {
    FASTGPT_WGMMA_S8(64, 32, 33, 34);
  } else if constexpr (kHalf == 64) {
    FASTGPT_WGMMA_S8(128, 64, 65, 66);
  } else if constexpr (kHalf == 96) {
    FASTGPT_WGMMA_S8(192, 96, 97, 98);
  } else {
    FASTGPT_WGMMA_S8(256, 128, 129, 130);
  }
#endif
}

}  // namespace fastgpt::device
