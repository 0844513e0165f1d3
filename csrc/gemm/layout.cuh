// The CUDA layout of quantized weights, and how dense weights look beside it.
//
// A weight [n, k] is cut into blobs of 16 rows. One blob is 1 KiB, read by one warp as two 16-byte
// loads per lane, which are the lane's operands of mma.m16n8k16 as they stand:
//
//     blob = [half 0..1][lane 0..31][16 bytes]     row = 8 * half + lane / 4
//
// A slot is 32 columns of the 16 rows. In slot a a lane holds the eight columns
// 32 a + 8 (lane % 4) .. + 7 of its rows, so four neighbouring lanes read 64 contiguous bytes of x:
//
//     int4   4 slots a blob (128 columns), 4 bytes a slot, nibbles in column order 0 2 4 6 1 3 5 7
//     fp8    2 slots a blob ( 64 columns), 8 bytes a slot, bytes in column order 0 2 1 3 | 4 6 5 7
//     int8   as fp8
//     dense  1 slot  a blob ( 32 columns), 16 bytes a slot; built by the copy to shared memory
//
// Columns are padded to a multiple of 128 and rows to one of 16 with codes that mean zero.
// packed: [ceil(n/16), ceil(k/cols)][1024]; int4 scale (float16) and zero_point (uint8):
// [ceil(n/16), groups of the padded columns, 16], so the scales of a warp's tile are contiguous.
// fp8 and int8 scales stay canonical. Group sizes over 128 are split into groups of 128.
#pragma once
#include <cstdint>

#include "fastgpt/gemm.h"

namespace fastgpt::gemm {

inline constexpr int kTileN = 16;       // weight rows of one blob
inline constexpr int kSlotCols = 32;    // columns of one slot
inline constexpr int kBlockCols = 128;  // columns are padded to this
inline constexpr int kBlobBytes = 1024;

#ifdef __CUDACC__
#define FASTGPT_HOST_DEVICE __host__ __device__
#else
#define FASTGPT_HOST_DEVICE
#endif

FASTGPT_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

FASTGPT_HOST_DEVICE constexpr int blob_cols(WeightFormat format) {
  return format == WeightFormat::kInt4 ? 128 : format == WeightFormat::kDense ? 32 : 64;
}

/// Bytes of 16 rows of packed.
FASTGPT_HOST_DEVICE constexpr std::int64_t tile_bytes(WeightFormat format, std::int64_t k) {
  return ceil_div(k, kBlockCols) * (kBlockCols / blob_cols(format)) * kBlobBytes;
}

/// Group size the kernels see for a canonical one.
constexpr int arranged_group_size(int group_size) { return group_size < 128 ? group_size : 128; }

/// Byte of packed that holds row r, column c (int4: c even half of a pair of nibbles, see above).
FASTGPT_HOST_DEVICE constexpr std::int64_t packed_offset(WeightFormat format, std::int64_t row,
                                                         std::int64_t column, std::int64_t k) {
  const int cols = blob_cols(format);
  const int slot_bytes = format == WeightFormat::kInt4 ? 4 : 8;
  const int in_blob = int(column % cols);
  const int lane = int(row % 8) * 4 + in_blob % kSlotCols / 8;
  return row / kTileN * tile_bytes(format, k) + column / cols * kBlobBytes +
         row % kTileN / 8 * (kBlobBytes / 2) + lane * 16 + in_blob / kSlotCols * slot_bytes;
}

/// Index of the scale of a row and column of an int4 weight.
FASTGPT_HOST_DEVICE constexpr std::int64_t scale_index(std::int64_t row, std::int64_t column,
                                                       std::int64_t k, int group_size) {
  const std::int64_t groups = ceil_div(k, kBlockCols) * (kBlockCols / group_size);
  return (row / kTileN * groups + column / group_size) * kTileN + row % kTileN;
}

}  // namespace fastgpt::gemm
