// 16 lanes in one 512-bit register. Included by the panel files of the AVX-512 sets only.
#pragma once
#ifndef __clang__
// GCC 12 warns about the undefined vectors of its own intrinsics once they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

namespace fastgpt::gemm {
namespace {

struct V {
  using F = __m512;
  using I = __m512i;

  static constexpr bool kPairsOfBlocks = true;  // one row: 8 panels keep enough chains in flight
  static constexpr int kStreamRows = 4;
  static constexpr int kTileRows = 6;  // 6 x 4 sums, 4 weights, 1 broadcast: 29 of 32 registers
  static constexpr int panels(int /*rows*/) { return 4; }

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static I load_i(const void* p) { return _mm512_loadu_si512(p); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F from_half(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F from_u8(const std::uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
  }
  static F bf16_low(I a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
  static F bf16_high(I a) {
    return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(int(0xFFFF0000U))));
  }
  /// Two e4m3 bytes of every word as bfloat16, exact: the low bytes of its 16-bit halves (kByte 0)
  /// or the high ones (kByte 1).
  template <int kByte>
  static I e4m3_pair(I raw) {
    const I byte = kByte == 0 ? raw : _mm512_srli_epi16(raw, 8);
    const I placed = kByte == 0 ? _mm512_slli_epi16(raw, 4) : _mm512_srli_epi16(raw, 4);
    const I magnitude = _mm512_and_si512(placed, _mm512_set1_epi16(0x7F0));
    const I sign = kByte == 0 ? _mm512_slli_epi16(raw, 8) : raw;
    // exponent bias 7 -> 127; the eight subnormals m 2^-9 come from a table
    const I normal = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
    const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x80));
    const I table = _mm512_broadcast_i32x4(
        _mm_setr_epi16(0x0000, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60));
    const I value = _mm512_mask_permutexvar_epi16(normal, small, byte, table);
    constexpr int kOrMasked = 0xF8;  // a | (b & c)
    return _mm512_ternarylogic_epi32(value, sign, _mm512_set1_epi16(std::int16_t(0x8000)),
                                     kOrMasked);
  }
  /// The e4m3 value in the byte at bit kShift of every word, exact. Bytes 0 and 2 share one
  /// e4m3_pair, 1 and 3 the other; the compiler computes each once.
  template <int kShift>
  static F e4m3(I a) {
    const I pair = e4m3_pair<kShift / 8 % 2>(a);
    return kShift < 16 ? bf16_low(pair) : bf16_high(pair);
  }
  /// The signed byte at bit kShift of every word.
  template <int kShift>
  static F signed_byte(I a) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, 24 - kShift), 24));
  }
  /// Two signed bytes of every word as bfloat16, exact: the low bytes of its 16-bit halves (kByte
  /// 0) or the high ones (kByte 1).
  template <int kByte>
  static I signed_byte_pair(I a) {
    const I low = _mm512_castps_si512(signed_byte<8 * kByte>(a));
    const I high = _mm512_castps_si512(signed_byte<8 * kByte + 16>(a));
    constexpr int kSelect = 0xD8;  // c ? b : a
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high,
                                     _mm512_set1_epi32(int(0xFFFF0000U)), kSelect);
  }
  /// The signed nibble at bit kShift of every word: one shift and a table of 16 floats, whose
  /// index uses the low four bits alone.
  template <int kShift>
  static F nibble(I a) {
    const F table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(a, kShift), table);
  }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static F half_low(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
  static F half_high(I a) { return half_low(_mm512_srli_epi32(a, 16)); }
  /// 16 words of each of 16 rows; word j of row i becomes lane i of out[j]. Asks for the bytes
  /// `ahead` of each row, which the hardware cannot guess among so many streams.
  static void transpose(const std::uint8_t* rows, std::int64_t row_bytes, std::int64_t ahead,
                        I* out) {
    I a[16];
    for (int i = 0; i < 16; ++i) {
      a[i] = load_i(rows + i * row_bytes);
      __builtin_prefetch(rows + i * row_bytes + ahead, 0, 3);
    }
    I b[16];
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 words inside each 128-bit lane
      const I low01 = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      const I high01 = _mm512_unpackhi_epi32(a[i], a[i + 1]);
      const I low23 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]);
      const I high23 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
      b[i] = _mm512_unpacklo_epi64(low01, low23);
      b[i + 1] = _mm512_unpackhi_epi64(low01, low23);
      b[i + 2] = _mm512_unpacklo_epi64(high01, high23);
      b[i + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
    for (int i = 0; i < 4; ++i) {  // then the 4 x 4 lanes
      const I low01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
      const I high01 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xDD);
      const I low23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
      const I high23 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xDD);
      out[i] = _mm512_shuffle_i32x4(low01, low23, 0x88);
      out[i + 8] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
      out[i + 4] = _mm512_shuffle_i32x4(high01, high23, 0x88);
      out[i + 12] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
    }
  }
  static void store_bf16(std::uint16_t* p, F a) {
    const I bits = _mm512_castps_si512(a);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const I nan = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    const I value = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), nan);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(value));
  }
  static void store_half(std::uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace
}  // namespace fastgpt::gemm
