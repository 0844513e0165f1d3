// bfloat16 rows: two products and two additions a lane and instruction (vdpbf16ps).
#include "gemm/vector_avx512.h"
// The kernels below are written over V.
#include "gemm/panel_kernel.h"

namespace fastgpt::gemm {
namespace {

// Loaders: a panel's step as four vectors of 16 pairs of bfloat16.
struct PairsBF16 {
  static constexpr std::int64_t kBytes = 256;
  template <int J>
  static __m512i get(const std::uint8_t* w) {
    return V::load_i(w + J * 64);
  }
};

struct PairsFp8 {
  static constexpr std::int64_t kBytes = 128;
  // Low bytes of the 16-bit halves are one pair of k, high bytes the next.
  template <int J>
  static __m512i get(const std::uint8_t* w) {
    return V::e4m3_pair<J % 2>(V::load_i(w + J / 2 * 64));
  }
};

struct PairsInt8 {
  static constexpr std::int64_t kBytes = 128;
  template <int J>
  static __m512i get(const std::uint8_t* w) {
    return V::signed_byte_pair<J % 2>(V::load_i(w + J / 2 * 64));
  }
};

struct PairsInt4 {
  static constexpr std::int64_t kBytes = 64;
  // One shift and a table; the index uses five bits, so the table holds the 16 values twice.
  template <int J>
  static __m512i get(const std::uint8_t* w) {
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, std::int16_t(0xC100),
        std::int16_t(0xC0E0), std::int16_t(0xC0C0), std::int16_t(0xC0A0), std::int16_t(0xC080),
        std::int16_t(0xC040), std::int16_t(0xC000), std::int16_t(0xBF80)));
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(V::load_i(w), 4 * J), table);
  }
};

struct ComputeBF16 {
  using X = std::uint16_t;
  using Dense = PairsBF16;
  static constexpr int kSubs = 4;
  static V::F mac(V::F acc, const X* x, int j, __m512i b) {
    std::int32_t pair;
    std::memcpy(&pair, x + 2 * j, sizeof(pair));
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
  static void store(std::uint8_t* out, int j, __m512i b) { _mm512_storeu_si512(out + j * 64, b); }
  template <class T>
  static void store_word(X* out, __m512i word) {
    static_assert(std::is_same_v<T, BFloat16>);
    _mm512_storeu_si512(out, word);
  }
  static X from(float value) { return from_float<BFloat16>(value).bits; }
  static std::int64_t at(std::int64_t c, std::int64_t k) {
    return k / kStep * kStep * kBlockColumns + c / 16 * kStep * 16 + k % kStep / 2 * 32 +
           c % 16 * 2 + k % 2;
  }
};

void run_bf16(const PanelTask& t) {
  switch (t.storage) {
    case Storage::kBF16:
      return run<ComputeBF16, PairsBF16>(t);
    case Storage::kFp8:
      return run<ComputeBF16, PairsFp8>(t);
    case Storage::kInt8:
      return run<ComputeBF16, PairsInt8>(t);
    case Storage::kInt4:
      return run<ComputeBF16, PairsInt4>(t);
    case Storage::kRowMajor:
      return run<ComputeBF16, LoadRows>(t);
    default:
      FASTGPT_CHECK(false, "no bfloat16 kernel for this weight");
  }
}

}  // namespace

PanelKernels panel_kernels_avx512bf16() { return {run_f32, run_bf16}; }

}  // namespace fastgpt::gemm
