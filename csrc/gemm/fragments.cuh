// From the bytes of one slot (layout.cuh) to the operands of tensor-core products.
#pragma once
#include <type_traits>

#include "device/dequant.cuh"
#include "gemm/layout.cuh"

namespace fastgpt::gemm {

/// Formats of a byte a code, with a scale per channel that meets the finished sum, and in what
/// units of it codes are multiplied.
template <WeightFormat kFormat>
inline constexpr bool kHasChannelScale =
    kFormat == WeightFormat::kFp8 || kFormat == WeightFormat::kInt8;
template <WeightFormat kFormat, class T>
inline constexpr float kCodeUnit = kFormat == WeightFormat::kFp8 ? device::kFp8Unit<T> : 1.0F;

/// Bytes that one lane owns of one slot: rows g and g + 8, eight columns each.
template <WeightFormat kFormat>
struct Slot;
template <>
struct Slot<WeightFormat::kInt4> {
  std::uint32_t rows[2];
};
template <>
struct Slot<WeightFormat::kFp8> {
  uint2 rows[2];
};
template <>
struct Slot<WeightFormat::kInt8> {
  uint2 rows[2];
};
template <>
struct Slot<WeightFormat::kDense> {
  uint4 rows[2];
};

/// Slot `a` out of a lane's 16-byte pieces [blob][half] of consecutive blobs.
template <WeightFormat kFormat>
__device__ Slot<kFormat> slot_of(const uint4* pieces, int a) {
  constexpr int kSlots = blob_cols(kFormat) / kSlotCols;
  Slot<kFormat> slot;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4& piece = pieces[a / kSlots * 2 + half];
    if constexpr (kFormat == WeightFormat::kInt4) {
      const std::uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
      slot.rows[half] = words[a % kSlots];
    } else if constexpr (blob_cols(kFormat) == 64) {
      slot.rows[half] =
          a % kSlots == 0 ? make_uint2(piece.x, piece.y) : make_uint2(piece.z, piece.w);
    } else {
      slot.rows[half] = piece;
    }
  }
  return slot;
}

/// Slot `a` of consecutive blobs in shared memory.
template <WeightFormat kFormat>
__device__ Slot<kFormat> read_slot(const std::uint8_t* blobs, int a, int lane) {
  constexpr int kSlots = blob_cols(kFormat) / kSlotCols;
  const std::uint8_t* bytes =
      blobs + a / kSlots * kBlobBytes + lane * 16 + a % kSlots * (16 / kSlots);
  Slot<kFormat> slot;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    slot.rows[half] = *reinterpret_cast<const std::remove_reference_t<decltype(slot.rows[0])>*>(
        bytes + half * (kBlobBytes / 2));
  }
  return slot;
}

/// Zero points of a lane's two rows; only int4 has any.
template <WeightFormat kFormat, class T>
struct SlotZero {
  __device__ SlotZero(int, int) {}
};
template <class T>
struct SlotZero<WeightFormat::kInt4, T> {
  device::Int4Zero<T> rows[2];
  __device__ SlotZero(int row0, int row1)
      : rows{device::Int4Zero<T>(row0), device::Int4Zero<T>(row1)} {}
};

/// The A operands of the two products of a slot, in units of the group's scale. Columns of the
/// product are permuted: lane t contributes its columns 4h .. 4h + 3 to product h, and x does too.
template <WeightFormat kFormat, class T>
__device__ void slot_operands(const Slot<kFormat>& slot, const SlotZero<kFormat, T>& zero,
                              std::uint32_t (&a)[2][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t pairs[4];
    if constexpr (kFormat == WeightFormat::kInt4) {
      device::dequant_int4(slot.rows[half], zero.rows[half], pairs);
    } else if constexpr (kFormat == WeightFormat::kFp8) {
      device::dequant_fp8<T>(slot.rows[half].x, pairs[0], pairs[1]);
      device::dequant_fp8<T>(slot.rows[half].y, pairs[2], pairs[3]);
    } else if constexpr (kFormat == WeightFormat::kInt8) {
      device::dequant_int8<T>(slot.rows[half].x, pairs[0], pairs[1]);
      device::dequant_int8<T>(slot.rows[half].y, pairs[2], pairs[3]);
    } else {
      pairs[0] = slot.rows[half].x;
      pairs[1] = slot.rows[half].y;
      pairs[2] = slot.rows[half].z;
      pairs[3] = slot.rows[half].w;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      a[h][half] = pairs[2 * h];
      a[h][half + 2] = pairs[2 * h + 1];
    }
  }
}

/// d += slot * x, both of type T: two products over 16 columns.
template <class T>
__device__ void multiply_slot(float (&d)[4], const std::uint32_t (&a)[2][4], const uint4& x) {
  device::mma_16x8x16<T>(d, a[0], x.x, x.y);
  device::mma_16x8x16<T>(d, a[1], x.z, x.w);
}

/// Bits of the float32 values of a pair.
__device__ inline void widen(std::uint32_t pair, __nv_bfloat16, std::uint32_t (&wide)[2]) {
  wide[0] = pair << 16;
  wide[1] = pair & 0xFFFF0000U;
}
__device__ inline void widen(std::uint32_t pair, __half, std::uint32_t (&wide)[2]) {
  const float2 values = __half22float2(device::half2_of(pair));
  wide[0] = __float_as_uint(values.x);
  wide[1] = __float_as_uint(values.y);
}

/// d += slot * x for a dense weight of another 16-bit type than x: four tf32 products over eight
/// columns, exact in each factor.
template <class W, class X>
__device__ void multiply_slot_mixed(float (&d)[4], const Slot<WeightFormat::kDense>& slot,
                                    const uint4& x) {
  const std::uint32_t w0[4] = {slot.rows[0].x, slot.rows[0].y, slot.rows[0].z, slot.rows[0].w};
  const std::uint32_t w1[4] = {slot.rows[1].x, slot.rows[1].y, slot.rows[1].z, slot.rows[1].w};
  const std::uint32_t xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    std::uint32_t row0[2], row1[2], b[2];
    widen(w0[i], W{}, row0);
    widen(w1[i], W{}, row1);
    widen(xs[i], X{}, b);
    device::mma_16x8x8_tf32(d, {row0[0], row1[0], row0[1], row1[1]}, b[0], b[1]);
  }
}

}  // namespace fastgpt::gemm
