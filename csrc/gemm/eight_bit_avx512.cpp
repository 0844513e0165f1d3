// AVX512-VNNI: 64 products of bytes and their sums by fours an instruction (vpdpbusd).
#ifndef __clang__
// GCC 12 warns about the undefined vectors of its own intrinsics once they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fastgpt::gemm {
namespace {

struct Dot {
  static constexpr int kRows = 6;  // 6 x 4 sums, 4 weights, 1 constant: 29 of 32 registers
  static constexpr int kPanelsAtOnce = 4;
  // One factor is unsigned: the weight, moved by 128, which adds 128 sum x.
  static constexpr std::int32_t kExcess = 128;

  template <int kCount>
  static void add_up(const std::int8_t* const (&x)[kCount], const std::int8_t* weight,
                     std::int64_t steps, std::int64_t step_bytes,
                     std::int32_t (&sums)[kCount][4][16]) {
    const __m512i moved = _mm512_set1_epi8(std::int8_t(-128));
    __m512i acc[kCount][4];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) acc[r][p] = _mm512_setzero_si512();
    }
    for (std::int64_t s = 0; s < steps; ++s, weight += step_bytes) {
#pragma GCC unroll 2
      for (int word = 0; word < 2; ++word) {
        __m512i w[4];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          w[p] = _mm512_xor_si512(_mm512_loadu_si512(weight + p * 128 + word * 64), moved);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
          std::int32_t four;
          std::memcpy(&four, x[r] + s * 8 + word * 4, 4);
          const __m512i c = _mm512_set1_epi32(four);
#pragma GCC unroll 4
          for (int p = 0; p < 4; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], w[p], c);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) _mm512_store_si512(sums[r][p], acc[r][p]);
    }
  }
};

}  // namespace
}  // namespace fastgpt::gemm

// The kernels below are written over Dot.
#include "gemm/eight_bit_kernel.h"

namespace fastgpt::gemm {

EightBitKernels eight_bit_kernels_avx512() { return {quantize_int8, multiply}; }

}  // namespace fastgpt::gemm
