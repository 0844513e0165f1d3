// Packed codes to the operands of a warp-group product (hopper.cuh).
//
// A blob (layout.cuh) lies in shared memory as 8 lines of 128 bytes, half 0 of its rows in lines
// 0 to 3; TMA exchanged the eight 16-byte pieces of a line by its number. The piece of lane
// (g, u) of the layout, 8 columns u of each slot in rows g and g + 8, is read by all four lanes of
// row g at once: lane t takes columns 2 t and 2 t + 1 of every eight, as the product wants them.
// Eight rows read eight different pieces of 16 bytes: no two of one bank.
#pragma once
#include "gemm/arguments.cuh"
#include "gemm/fragments.cuh"

namespace fastgpt::gemm {

/// After how many columns the scale of a weight row may change.
enum class Scales { kRow, kGroup128, kGroup32 };

/// What turns a code into its value: value = raw(code) * factor + offset for int4, and codes times
/// factor, 0 or 1, for fp8 in blocks. A group of scale 0 has factor 0.
struct CodeTerms {
  std::uint32_t factor, offset;  // twice each, in the type of x
};

/// Columns 2 t and 2 t + 1 of the eight in a word of int4 codes. The raw form is 128 + code in
/// bfloat16, 1024 + code in float16, exact as is what comes out.
template <class X>
__device__ std::uint32_t int4_pair(std::uint32_t word, int t, const CodeTerms& terms) {
  if constexpr (std::is_same_v<X, __half>) {
    const std::uint32_t raw = device::and_or<0x000F000FU, 0x64006400U>(word >> 4 * t);
    return device::bits_of(__hfma2(device::half2_of(raw), device::half2_of(terms.factor),
                                   device::half2_of(terms.offset)));
  } else {
    const std::uint32_t raw = device::and_or<0x000F000FU, 0x43004300U>(word >> 4 * t);
    return device::fma_bf16x2(raw, terms.factor, terms.offset);
  }
}
template <class X>
__device__ CodeTerms int4_terms(int zero_point, bool is_zero) {
  constexpr bool kF16 = std::is_same_v<X, __half>;
  const std::uint32_t offset = (kF16 ? 0xE400U : 0xC300U) + unsigned(zero_point);
  return is_zero ? CodeTerms{0, 0} : CodeTerms{kF16 ? 0x3C003C00U : 0x3F803F80U, offset * 0x10001U};
}

/// Columns 2 t and 2 t + 1 of eight codes of a byte; `word` is word t / 2 of theirs, bytes in
/// column order 0 2 1 3. As device::dequant_fp8 and dequant_int8, which make both pairs of a word.
template <WeightFormat kFormat, class X>
__device__ std::uint32_t byte_pair(std::uint32_t word, int t) {
  if constexpr (kFormat == WeightFormat::kFp8) {
    word <<= t % 2 == 0 ? 8 : 0;
    if constexpr (std::is_same_v<X, __half>) {
      return (word & 0x80008000U) | ((word >> 1) & 0x3F803F80U);
    } else {
      constexpr std::uint32_t kUnit = 0x7B807B80U;       // 2^120
      constexpr std::uint32_t kMinusZero = 0x80008000U;  // keeps the sign of a zero product
      const std::uint32_t raw = (word & 0x80008000U) | ((word >> 4) & 0x07F007F0U);
      return device::fma_bf16x2(raw, kUnit, kMinusZero);
    }
  } else {
    word >>= t % 2 == 0 ? 0 : 8;
    if constexpr (std::is_same_v<X, __half>) {
      const __half2 zero = device::half2_of(0xE480E480U);  // -1152
      return device::bits_of(
          __hadd2(device::half2_of(device::and_xor<0x00FF00FFU, 0x64806480U>(word)), zero));
    } else {
      constexpr std::uint32_t kMinusOne = 0xBF80BF80U;
      return device::fma_bf16x2(device::and_or<0x00800080U, 0x43004300U>(word), kMinusOne,
                                device::and_or<0x007F007FU, 0x43004300U>(word));
    }
  }
}

/// The operands of a lane made from the packed stages, and the units its sums are kept in.
template <WeightFormat kFormat, class X, Scales kScales>
class HopperOperands {
 public:
  static constexpr bool kInt4 = kFormat == WeightFormat::kInt4;
  static constexpr int kScaleSlots = kScales == Scales::kGroup32 ? 2 : 1;  // of a part

  __device__ HopperOperands(const ProductArgs& p, int lane, int tile_of_cta)
      : g_(lane / 4),
        t_(lane % 4),
        tile_(tile_of_cta),
        groups_(kInt4 ? kBlockCols / p.group_size : 1),
        has_zero_(kInt4 && p.zero_point != nullptr),
        piece_(g_ / 2 * 128 + g_ % 2 * 64 + g_ / 2 * 16) {}

  /// Make the operands of part `kPart` (64 columns) of a weight stage: four products of 16 columns.
  /// block_scale: fp8 with a scale per 128 x 128.
  template <class Ring, int kPart>
  __device__ void make(const std::uint8_t* stage, float block_scale, std::uint32_t (&a)[4][4],
                       float (&change)[kScaleSlots][2]) {
    std::uint32_t words[2][4][2];  // [half][u][slot]
    load_words(stage + tile_ * Ring::kTileBytes + (kInt4 ? 0 : kPart * kBlobBytes),
               kInt4 ? kPart * 8 : t_ / 2 * 4, words);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (kScales == Scales::kGroup32 || (kPart == 0 && s == 0)) {
        const int group = kScales == Scales::kGroup32 ? (2 * kPart + s) * groups_ / 4 : 0;
        read_scales<Ring>(stage, group, block_scale);
        if constexpr (kScales != Scales::kRow) change_units(change[s]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // [product][columns 0 to 7 or 8 to 15][half]
        const int half = i % 2;
        const std::uint32_t word = words[half][i / 2][s];
        std::uint32_t& operand = a[2 * s + i / 4][i % 4];
        if constexpr (kInt4) {
          operand = int4_pair<X>(word, t_, terms_[half]);
        } else {
          operand = byte_pair<kFormat, X>(word, t_);
          if constexpr (kScales != Scales::kRow) operand &= scale_[half] == 0.0F ? 0U : ~0U;
        }
      }
    }
  }

  /// Unit of the sums of row g + 8 * half.
  __device__ float unit(int half) const { return unit_[half]; }

 private:
  /// Of both slots: int4 the word at `offset` of each piece and the next, else those at `offset`
  /// of its two halves.
  __device__ void load_words(const std::uint8_t* blob, int offset,
                             std::uint32_t (&words)[2][4][2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const std::uint8_t* at = blob + half * (kBlobBytes / 2) + (piece_ ^ (half * 64 + u * 16));
        if constexpr (kInt4) {
          const auto both = *reinterpret_cast<const uint2*>(at + offset);
          words[half][u][0] = both.x;
          words[half][u][1] = both.y;
        } else {
          words[half][u][0] = *reinterpret_cast<const std::uint32_t*>(at + offset);
          words[half][u][1] = *reinterpret_cast<const std::uint32_t*>(at + offset + 8);
        }
      }
    }
  }

  /// Scales and zero points of a group of this lane's rows.
  template <class Ring>
  __device__ void read_scales(const std::uint8_t* stage, int group, float block_scale) {
    if constexpr (kInt4) {
      const int groups = kScales == Scales::kGroup128 ? 1 : groups_;
      const int row = (tile_ * groups + group) * kTileN + g_;
      const auto* scales = reinterpret_cast<const __half*>(stage + Ring::kCodeBytes);
      const std::uint8_t* zeros = stage + Ring::kCodeBytes + Ring::kScaleBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scale_[half] = __half2float(scales[row + 8 * half]);
        const int zero = has_zero_ ? zeros[row + 8 * half] : 8;
        terms_[half] = int4_terms<X>(zero, scale_[half] == 0.0F);
      }
    } else {
      scale_[0] = scale_[1] = block_scale;
    }
  }

  /// Sums so far times `change` are in units of the new scale. A group of scale 0 adds nothing and
  /// keeps the unit.
  __device__ void change_units(float (&change)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      change[half] = 1.0F;
      if (scale_[half] != 0.0F) {
        if (unit_[half] != 0.0F) change[half] = unit_[half] / scale_[half];
        unit_[half] = scale_[half];
      }
    }
  }

  int g_, t_, tile_, groups_;
  bool has_zero_;
  int piece_;                     // of u = 0 and half 0 in a blob
  float unit_[2] = {0.0F, 0.0F};  // none yet
  float scale_[2] = {1.0F, 1.0F};
  CodeTerms terms_[2] = {};
};

}  // namespace fastgpt::gemm
