// From the sums of a tile to rows of out (hopper.cuh).
//
// A lane holds, of 16 weight rows of its warp, rows g and g + 8 (g = lane / 4) and of every eight
// rows of x rows 2 t and 2 t + 1 (t = lane % 4): sum[4 j ..] are rows g, g, g + 8, g + 8 of the
// weight and rows 8 j + 2 t, 8 j + 2 t + 1 of x, twice.
#pragma once
#include "device/bulk.cuh"
#include "device/mma.cuh"
#include "gemm/hopper_ring.cuh"

namespace fastgpt::gemm {

/// Row of x and row of the weight, both within the tile, of sum[i].
__device__ inline int sum_row(int i, int lane) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }
__device__ inline int sum_column(int i, int lane, int warp) {
  return warp * 16 + lane / 4 + i / 2 % 2 * 8;
}

/// The CTAs of a cluster add up their sums of one tile; each one writes every size-th row.
/// Every thread of the eight warps calls it; the copying warp meets it in two cluster_sync.
template <class Ring, int kRows>
__device__ void store_split(const ProductArgs& p, const HopperTiles<kRows>& tiles,
                            const HopperTile& tile, std::uint8_t* shared,
                            const float (&sum)[kRows / 2], int warp, int lane) {
  device::named_barrier<3>(256);  // both warp groups have left the rings
  auto* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    sums[sum_row(i, lane) * Ring::kSumPitch + sum_column(i, lane, warp)] = sum[i];
  }
  device::cluster_sync();
  const std::int64_t column = std::int64_t(tile.weight) * kHopperN + lane * 4;
  for (int row = warp * tiles.size() + tiles.rank(); row < tile.rows.count;
       row += 8 * tiles.size()) {
    float total[4] = {};
#pragma unroll 4
    for (int rank = 0; rank < tiles.size(); ++rank) {
      const float4 part =
          device::load_cluster(sums + row * Ring::kSumPitch + lane * 4, unsigned(rank));
      total[0] += part.x;
      total[1] += part.y;
      total[2] += part.z;
      total[3] += part.w;
    }
    const std::int64_t offset = out_offset(p, tile.rows, row);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + j < p.n) store_product(p, offset, column + j, total[j]);
    }
  }
  device::fence_async_proxy();
  device::cluster_sync_relaxed();  // what was read has arrived
}

/// Add the bias, round once and store a whole tile. Values of 16 bits pass through `staged`, 64
/// rows of out at a time, so that eight lanes write 128 bytes of a row; one warp group calls it.
template <class X, int kRows>
__device__ void store_whole(const ProductArgs& p, const HopperTile& tile, std::uint8_t* staged,
                            float (&sum)[kRows / 2], int warp, int lane) {
  const int count = tile.rows.count;
  const std::int64_t n0 = std::int64_t(tile.weight) * kHopperN;
  if (p.bias != nullptr) {
    float bias[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t column = n0 + sum_column(2 * half, lane, warp);
      if (column < p.n) bias[half] = device::load_float(p.bias, p.bias_dtype, column);
    }
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) sum[i] += bias[i / 2 % 2];
  }
  if (!p.out_aligned || p.out_dtype == DType::kF32) {
    // Eight lanes hold neighbouring columns of a row: a sector each time in float32.
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const int row = sum_row(i, lane);
      const std::int64_t column = n0 + sum_column(i, lane, warp);
      if (row < count && column < p.n) {
        device::store_float(p.out, p.out_dtype, out_offset(p, tile.rows, row) + column, sum[i]);
      }
    }
    return;
  }
  const int group = warp / 4;
  const int thread = warp % 4 * 32 + lane;
  auto* const out = static_cast<X*>(p.out) + n0 + group * 64;
  const std::int64_t columns = p.n - n0 - group * 64;
#pragma unroll
  for (int pass = 0; pass < kRows / 64; ++pass) {
    if (pass * 64 >= count) break;
    // [64 rows][64 columns], the eight chunks of a row exchanged by its number.
#pragma unroll
    for (int j = 0; j < 8; j += 2) {  // twice eight rows by twice eight columns
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &sum[(pass * 8 + j) * 4 + 2 * i];
        words[i] = device::pack_pair<X>(pair[0], pair[1]);
      }
      const int row = j * 8 + lane / 16 * 8 + lane % 8;
      const int chunk = warp % 4 * 2 + lane / 8 % 2;
      device::store_matrix_x4_transposed(staged + row * 128 + (chunk ^ row % 8) * 16, words);
    }
    group == 0 ? device::named_barrier<1>(128) : device::named_barrier<2>(128);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 16 + thread / 8;
      const int chunk = thread % 8;
      const uint4 values =
          *reinterpret_cast<const uint4*>(staged + row * 128 + (chunk ^ row % 8) * 16);
      if (pass * 64 + row >= count) continue;
      X* const to = out + out_offset(p, tile.rows, pass * 64 + row) + chunk * 8;
      if (chunk * 8 + 8 <= columns) {
        *reinterpret_cast<uint4*>(to) = values;
      } else {
        const auto* each = reinterpret_cast<const X*>(&values);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (chunk * 8 + j < columns) to[j] = each[j];
        }
      }
    }
    group == 0 ? device::named_barrier<1>(128) : device::named_barrier<2>(128);
  }
}

}  // namespace fastgpt::gemm
