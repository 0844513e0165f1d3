// What every CUDA product of this family gets, and which rows a CTA computes.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "device/vec.cuh"
#include "fastgpt/gemm.h"

namespace fastgpt::gemm {

/// d = x @ weight.T + bias of linear, grouped_linear and batched_linear. Strides count elements of
/// x and out, bytes of packed. Passed by value.
struct ProductArgs {
  const void* x;
  const std::uint8_t* packed;      // dense rows, or the layout of layout.cuh
  const void* scale;               // float [n], fp8 also per 128 x 128; int4: layout.cuh
  const std::uint8_t* zero_point;  // int4 asymmetric; nullptr = 8
  const void* bias;                // [n]; nullptr = none
  void* out;
  DType x_dtype;
  DType weight_dtype;  // dense
  DType bias_dtype;
  DType out_dtype;
  bool x_aligned;       // rows of x can be read 16 bytes at a time
  bool out_aligned;     // so can rows of out be written
  bool weight_aligned;  // and rows of a dense weight be read
  bool block_scale;     // fp8: one scale per 128 x 128
  int group_size;       // int4: 32, 64 or 128 after arranging
  std::int64_t num_rows;
  std::int64_t n;
  std::int64_t k;
  std::int64_t x_stride;
  std::int64_t out_stride;
  std::int64_t weight_row_bytes;  // dense
  // batched: blockIdx.z is the head. grouped: the expert selects the weight.
  std::int64_t x_batch_stride;
  std::int64_t out_batch_stride;
  std::int64_t weight_batch_bytes;
  std::int64_t scale_batch_bytes;
  std::int64_t zero_batch_bytes;
  // grouped
  const std::int32_t* sorted_rows;  // nullptr = linear or batched
  const std::int32_t* offsets;
  std::int64_t rows_per_token;
  int num_experts;
};

/// The rows of one CTA: positions first .. first + count - 1, all of one weight.
struct RowTile {
  std::int64_t first;
  int count;
  int weight;  // expert or head
};

/// Row tile `index` for tiles of kRows. Grouped: tiles never cross experts and the grid is the
/// bound num_experts + num_rows / kRows, so it does not depend on the routing and can be captured;
/// CTAs past the last tile get count 0. Every warp of the CTA computes the same answer by a scan
/// over the experts, 32 at a time.
template <int kRows>
__device__ RowTile row_tile(const ProductArgs& p, std::int64_t index, int head) {
  if (p.sorted_rows == nullptr) {
    const std::int64_t first = index * kRows;
    const std::int64_t left = p.num_rows - first;
    return {first, int(left < kRows ? left : kRows), head};
  }
  const int lane = int(threadIdx.x % 32);
  std::int64_t before = 0;  // tiles of the experts already passed
  for (int base = 0; base < p.num_experts; base += 32) {
    const int expert = base + lane;
    int begin = 0, end = 0;
    if (expert < p.num_experts) {
      begin = p.offsets[expert];
      end = p.offsets[expert + 1];
    }
    const int tiles = (end - begin + kRows - 1) / kRows;
    int upto = tiles;  // inclusive scan
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0U, upto, step);
      if (lane >= step) upto += other;
    }
    const std::int64_t mine = index - before - (upto - tiles);
    const unsigned owner = __ballot_sync(~0U, mine >= 0 && mine < tiles);
    if (owner != 0) {
      const int source = __ffs(int(owner)) - 1;
      const int first = begin + int(mine) * kRows;
      const int left = end - first;
      RowTile tile;
      tile.first = __shfl_sync(~0U, first, source);
      tile.count = __shfl_sync(~0U, left < kRows ? left : kRows, source);
      tile.weight = base + source;
      return tile;
    }
    before += __shfl_sync(~0U, upto, 31);
  }
  return {0, 0, 0};
}

/// The same for the head that blockIdx.z names.
template <int kRows>
__device__ RowTile row_tile(const ProductArgs& p, std::int64_t index) {
  return row_tile<kRows>(p, index, int(blockIdx.z));
}

/// Offset in elements of the x row and of the out row of a position.
__device__ inline std::int64_t x_offset(const ProductArgs& p, const RowTile& tile, int row) {
  const std::int64_t position = tile.first + row;
  if (p.sorted_rows == nullptr) return tile.weight * p.x_batch_stride + position * p.x_stride;
  return p.sorted_rows[position] / p.rows_per_token * p.x_stride;
}
__device__ inline std::int64_t out_offset(const ProductArgs& p, const RowTile& tile, int row) {
  const std::int64_t position = tile.first + row;
  if (p.sorted_rows == nullptr) return tile.weight * p.out_batch_stride + position * p.out_stride;
  return p.sorted_rows[position] * p.out_stride;
}

/// Add the bias, round once, store.
__device__ inline void store_product(const ProductArgs& p, std::int64_t row_offset,
                                     std::int64_t column, float value) {
  if (p.bias != nullptr) value += device::load_float(p.bias, p.bias_dtype, column);
  device::store_float(p.out, p.out_dtype, row_offset + column, value);
}

/// Row tiles of kRows that a launch needs at most.
inline std::int64_t num_row_tiles(const ProductArgs& p, int rows) {
  if (p.sorted_rows == nullptr) return (p.num_rows + rows - 1) / rows;
  const std::int64_t experts = p.num_rows < p.num_experts ? p.num_rows : p.num_experts;
  return experts + p.num_rows / rows;
}

}  // namespace fastgpt::gemm
