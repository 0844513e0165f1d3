// 16 lanes in two 256-bit registers.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fastgpt::gemm {
namespace {

struct V {
  struct F {
    __m256 low;
    __m256 high;
  };
  struct I {
    __m256i low;
    __m256i high;
  };

  static constexpr bool kPairsOfBlocks = false;
  static constexpr int kStreamRows = 4;
  static constexpr int kTileRows = 4;  // 4 x 2 sums, 2 weights, 1 broadcast: 11 of 16 registers
  static constexpr int panels(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
  }
  static I load_i(const void* p) {
    const auto* words = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
  }
  static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static F fnma(F a, F b, F c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
  }
  static F from_half(const std::uint16_t* p) {
    const auto* halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  static F from_u8(const std::uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  static F bf16_low(I a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a.low, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(a.high, 16))};
  }
  static F bf16_high(I a) {
    const __m256i mask = _mm256_set1_epi32(int(0xFFFF0000U));
    return {_mm256_castsi256_ps(_mm256_and_si256(a.low, mask)),
            _mm256_castsi256_ps(_mm256_and_si256(a.high, mask))};
  }
  /// The e4m3 value in the byte at bit kShift of every word, exact.
  template <int kShift>
  static F e4m3(I a) {
    return {e4m3_half(_mm256_srli_epi32(a.low, kShift)),
            e4m3_half(_mm256_srli_epi32(a.high, kShift))};
  }
  /// The signed byte at bit kShift of every word.
  template <int kShift>
  static F signed_byte(I a) {
    return {signed_half<8, kShift>(a.low), signed_half<8, kShift>(a.high)};
  }
  /// The signed nibble at bit kShift of every word.
  template <int kShift>
  static F nibble(I a) {
    return {signed_half<4, kShift>(a.low), signed_half<4, kShift>(a.high)};
  }
  static F as_float(I a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
  static F half_low(I a) {
    const __m256i mask = _mm256_set1_epi32(0xFFFF);
    const __m256i packed =
        _mm256_packus_epi32(_mm256_and_si256(a.low, mask), _mm256_and_si256(a.high, mask));
    const __m256i halves = _mm256_permute4x64_epi64(packed, 0xD8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
  }
  static F half_high(I a) {
    return half_low({_mm256_srli_epi32(a.low, 16), _mm256_srli_epi32(a.high, 16)});
  }
  /// 16 words of each of 16 rows; word j of row i becomes lane i of out[j].
  static void transpose(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t /*ahead*/,
                        I* out) {
    std::uint32_t words[16][16];
    for (int i = 0; i < 16; ++i) {
      std::uint32_t row[16];
      std::memcpy(row, rows + i * row_bytes, sizeof(row));
      for (int j = 0; j < 16; ++j) words[j][i] = row[j];
    }
    std::memcpy(static_cast<void*>(out), words, sizeof(words));
  }
  static void store_bf16(std::uint16_t* p, F a) {
    const __m256i words = _mm256_packus_epi32(bf16_words(a.low), bf16_words(a.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xD8));
  }
  static void store_half(std::uint16_t* p, F a) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    auto* out = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(out, _mm256_cvtps_ph(a.low, kMode));
    _mm_storeu_si128(out + 1, _mm256_cvtps_ph(a.high, kMode));
  }

 private:
  static __m256 e4m3_half(__m256i byte) {
    const __m256i magnitude = _mm256_and_si256(byte, _mm256_set1_epi32(0x7F));
    const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
    // exponent bias 7 -> 127; a subnormal m reads as (1 + m / 8) 2^-7, and is m 2^-9
    const __m256 normal = _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
    const __m256 subnormal = _mm256_fmsub_ps(normal, _mm256_set1_ps(2.0F), _mm256_set1_ps(0x1p-6F));
    const __m256 value = _mm256_blendv_ps(normal, subnormal, _mm256_castsi256_ps(small));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(byte, _mm256_set1_epi32(0x80)), 24);
    return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
  }
  template <int kBits, int kShift>
  static __m256 signed_half(__m256i words) {
    return _mm256_cvtepi32_ps(
        _mm256_srai_epi32(_mm256_slli_epi32(words, 32 - kBits - kShift), 32 - kBits));
  }
  static __m256i bf16_words(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, nan, unordered);
  }
};

}  // namespace
}  // namespace fastgpt::gemm

// The kernels below are written over V.
#include "gemm/panel_kernel.h"

namespace fastgpt::gemm {

PanelKernels panel_kernels_avx2() { return {run_f32, nullptr}; }

}  // namespace fastgpt::gemm
