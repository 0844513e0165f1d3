// Packed codes to the operands of a warp-group product (hopper.cuh).
#pragma once
#include "gemm/arguments.cuh"
#include "gemm/fragments.cuh"

namespace fastgpt::gemm {

/// After how many columns the scale of a weight row may change.
enum class Scales { kRow, kGroup128, kGroup32 };

/// In a slot of the packed layout a lane holds eight neighbouring columns of its rows; a product
/// wants pair t of every eight columns in lane t. Four lanes exchange their pairs: a transpose.
__device__ inline void exchange_pairs(Slot<WeightFormat::kInt4>& slot, int t) {
  const std::uint32_t keep1 = t & 1 ? 0xF0F0F0F0U : 0x0F0F0F0FU;  // pair i is nibbles i and i + 4
  const std::uint32_t keep2 = t & 2 ? 0xFF00FF00U : 0x00FF00FFU;
  const int turn1 = t & 1 ? 28 : 4, turn2 = t & 2 ? 24 : 8;
#pragma unroll
  for (std::uint32_t& word : slot.rows) {
    std::uint32_t other = __shfl_xor_sync(~0U, word, 1);
    word = (word & keep1) | (__funnelshift_l(other, other, turn1) & ~keep1);
    other = __shfl_xor_sync(~0U, word, 2);
    word = (word & keep2) | (__funnelshift_l(other, other, turn2) & ~keep2);
  }
}
template <WeightFormat kFormat>  // of a byte a code
__device__ void exchange_pairs(Slot<kFormat>& slot, int t) {
  const std::uint32_t send = t & 1 ? 0x6420U : 0x7531U;  // pair 0 is bytes 0 and 2, pair 1 1 and 3
  const std::uint32_t merge_x = t & 1 ? 0x3514U : 0x5240U;
  const std::uint32_t merge_y = t & 1 ? 0x3716U : 0x7260U;
#pragma unroll
  for (uint2& words : slot.rows) {
    const std::uint32_t word = __shfl_xor_sync(~0U, t & 2 ? words.x : words.y, 2);
    words = t & 2 ? make_uint2(word, words.y) : make_uint2(words.x, word);
    const std::uint32_t other = __shfl_xor_sync(~0U, __byte_perm(words.x, words.y, send), 1);
    words.x = __byte_perm(words.x, other, merge_x);
    words.y = __byte_perm(words.y, other, merge_y);
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
        lane_(lane),
        tile_(tile_of_cta),
        groups_(kInt4 ? kBlockCols / p.group_size : 1),
        has_zero_(kInt4 && p.zero_point != nullptr) {}

  /// Make the operands of part `kPart` (64 columns) of a weight stage: four products of 16 columns.
  /// block_scale: fp8 with a scale per 128 x 128.
  template <class Ring, int kPart>
  __device__ void make(const std::uint8_t* stage, float block_scale, std::uint32_t (&a)[4][4],
                       float (&change)[kScaleSlots][2]) {
    constexpr int kSlots = blob_cols(kFormat) / kSlotCols;
    const std::uint8_t* blobs = stage + tile_ * Ring::kTileBytes;
    if constexpr (kInt4) {
      if constexpr (kPart == 0) load_pieces(blobs);
    } else {
      load_pieces(blobs + kPart * kBlobBytes);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      constexpr bool kEachSlot = kScales == Scales::kGroup32;
      const int slot_index = 2 * kPart + s;
      if (kEachSlot || (kPart == 0 && s == 0)) {
        read_scales<Ring>(stage, kEachSlot ? slot_index * groups_ / 4 : 0, block_scale);
        if constexpr (kScales != Scales::kRow) change_units(change[kEachSlot ? s : 0]);
      }
      Slot<kFormat> slot = slot_of<kFormat>(pieces_, slot_index % kSlots);
      exchange_pairs(slot, t_);
      std::uint32_t pair[2][4];
      slot_operands<kFormat, X>(slot, zero_, pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[2 * s][i] = pair[0][i];
        a[2 * s + 1][i] = pair[1][i];
      }
      // A group of scale 0 adds nothing and keeps the unit.
      if (kScales != Scales::kRow && __any_sync(~0U, scale_[0] == 0.0F || scale_[1] == 0.0F)) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (scale_[i % 2] == 0.0F) a[2 * s + i / 4][i % 4] = 0;
        }
      }
    }
  }

  /// Unit of the sums of row g + 8 * half.
  __device__ float unit(int half) const { return unit_[half]; }

 private:
  __device__ void load_pieces(const std::uint8_t* blob) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pieces_[half] = *reinterpret_cast<const uint4*>(blob + half * (kBlobBytes / 2) + lane_ * 16);
    }
  }

  /// Scales and zero points of a group of this lane's rows.
  template <class Ring>
  __device__ void read_scales(const std::uint8_t* stage, int group, float block_scale) {
    if constexpr (kInt4) {
      const int groups = kScales == Scales::kGroup128 ? 1 : groups_;
      const int row = (tile_ * groups + group) * kTileN + g_;
      const auto* scales = reinterpret_cast<const __half*>(stage + Ring::kCodeBytes);
      scale_[0] = __half2float(scales[row]);
      scale_[1] = __half2float(scales[row + 8]);
      if (has_zero_) {
        const std::uint8_t* zeros = stage + Ring::kCodeBytes + Ring::kScaleBytes;
        zero_ = SlotZero<kFormat, X>(zeros[row], zeros[row + 8]);
      }
    } else {
      scale_[0] = scale_[1] = block_scale;
    }
  }

  /// Sums so far times `change` are in units of the new scale.
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

  int g_, t_, lane_, tile_, groups_;
  bool has_zero_;
  float unit_[2] = {0.0F, 0.0F};  // none yet
  float scale_[2] = {1.0F, 1.0F};
  SlotZero<kFormat, X> zero_{8, 8};
  uint4 pieces_[2];
};

}  // namespace fastgpt::gemm
