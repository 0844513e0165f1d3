// Any x86-64: GCC vectors of 16 bytes, which the compiler lowers to SSE2.
#include <cstdint>
#include <cstring>

#include "fastgpt/half.h"

namespace fastgpt::gemm {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef std::int32_t Int4 __attribute__((vector_size(16)));

struct V {
  struct F {
    Float4 v[4];
  };
  struct I {
    Int4 v[4];
  };

  static constexpr bool kPairsOfBlocks = false;
  static constexpr int kStreamRows = 2;
  static constexpr int kTileRows = 2;
  static constexpr int panels(int /*rows*/) { return 1; }

  template <class R = F, class Fn>
  static R each(Fn&& fn) {
    return {{fn(0), fn(1), fn(2), fn(3)}};
  }
  static F zero() { return F{}; }
  static F set1(float x) {
    return each([&](int) { return Float4{} + x; });
  }
  static F load(const float* p) {
    F r;
    std::memcpy(&r, p, sizeof(r));
    return r;
  }
  static void store(float* p, F a) { std::memcpy(p, &a, sizeof(a)); }
  static I load_i(const void* p) {
    I r;
    std::memcpy(&r, p, sizeof(r));
    return r;
  }
  static F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F fma(F a, F b, F c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F fnma(F a, F b, F c) {
    return each([&](int i) { return c.v[i] - a.v[i] * b.v[i]; });
  }
  static F from_half(const std::uint16_t* p) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i / 4][i % 4] = to_float(Half{p[i]});
    return r;
  }
  static F from_u8(const std::uint8_t* p) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i / 4][i % 4] = float(p[i]);
    return r;
  }
  static F bf16_low(I a) {
    return each([&](int i) { return reinterpret_cast<Float4>(a.v[i] << 16); });
  }
  static F bf16_high(I a) {
    return each([&](int i) { return reinterpret_cast<Float4>((a.v[i] >> 16) << 16); });
  }
  /// The e4m3 value in the byte at bit kShift of every word, exact.
  template <int kShift>
  static F e4m3(I a) {
    return each([&](int i) {
      const Int4 byte = a.v[i] >> kShift;
      const Int4 magnitude = byte & 0x7F;
      // exponent bias 7 -> 127; below 8 the code is subnormal, magnitude * 2^-9
      const Int4 normal = (magnitude << 20) + (120 << 23);
      const Float4 subnormal = __builtin_convertvector(magnitude, Float4) * 0x1p-9F;
      const Int4 small = magnitude < 8;
      const Int4 bits = (small & reinterpret_cast<Int4>(subnormal)) | (~small & normal);
      return reinterpret_cast<Float4>(bits | ((byte & 0x80) << 24));
    });
  }
  /// The signed byte at bit kShift of every word.
  template <int kShift>
  static F signed_byte(I a) {
    return each(
        [&](int i) { return __builtin_convertvector((a.v[i] << (24 - kShift)) >> 24, Float4); });
  }
  /// The signed nibble at bit kShift of every word.
  template <int kShift>
  static F nibble(I a) {
    return each(
        [&](int i) { return __builtin_convertvector((a.v[i] << (28 - kShift)) >> 28, Float4); });
  }
  static F as_float(I a) {
    return each([&](int i) { return reinterpret_cast<Float4>(a.v[i]); });
  }
  static F half_low(I a) {
    F r;
    for (int i = 0; i < 16; ++i) {
      r.v[i / 4][i % 4] = to_float(Half{std::uint16_t(a.v[i / 4][i % 4])});
    }
    return r;
  }
  static F half_high(I a) {
    return half_low(each<I>([&](int i) { return a.v[i] >> 16; }));
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
    for (int i = 0; i < 16; ++i) p[i] = from_float<BFloat16>(a.v[i / 4][i % 4]).bits;
  }
  static void store_half(std::uint16_t* p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = from_float<Half>(a.v[i / 4][i % 4]).bits;
  }
};

}  // namespace
}  // namespace fastgpt::gemm

#include "gemm/panel_kernel.h"

namespace fastgpt::gemm {

PanelKernels panel_kernels_portable() { return {run_f32, nullptr}; }

}  // namespace fastgpt::gemm
