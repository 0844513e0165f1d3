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

/// The CTAs of a cluster add up their sums of one tile. Each one owns a share of the eights of its
/// rows of x: a lane sends what it holds of the others' to the same lane of the owner, which adds
/// them to its own in the order of their ranks. They take the place of the rings:
/// [other rank][eight][thread] of 16 bytes.
template <class Ring, int kRows>
class SplitSums {
 public:
  __device__ SplitSums(typename Ring::Barriers& barriers, std::uint8_t* shared, int rank, int size,
                       int warp, int lane)
      : barriers_(barriers),
        shared_(shared + (warp * 32 + lane) * 16),
        rank_(rank),
        size_(size),
        warp_(warp),
        lane_(lane) {}

  /// Turn `sum` of the rows this CTA owns, first_row() .. end_row() - 1, into the sums of all; the
  /// rest is void. Every thread of the eight warps calls it, its products done.
  /// @param count rows of x in the tile
  __device__ void add(float (&sum)[kRows / 2], int count) {
    const int eights = (count + 7) / 8;
    share_ = (eights + size_ - 1) / size_;
    first_ = min(rank_ * share_, eights);
    end_ = min(first_ + share_, eights);
    __syncwarp();
    if (lane_ < size_) device::barrier_arrive_at(&barriers_.sums_free, unsigned(lane_));
    if (warp_ == 0 && lane_ == 0) {
      device::barrier_expect(&barriers_.sums_full,
                             unsigned((size_ - 1) * (end_ - first_) * kEightBytes));
    }
    device::barrier_wait(&barriers_.sums_free, parity_);
    int owner = -1, next = 0;  // and the first eight behind the owner's
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      if (i >= eights) break;
      if (i == next) {
        ++owner;
        next += share_;
      }
      if (owner == rank_) continue;
      device::store_cluster(part(rank_ - (rank_ > owner), i - (next - share_)), &sum[4 * i],
                            &barriers_.sums_full, unsigned(owner));
    }
    device::barrier_wait(&barriers_.sums_full, parity_);
#pragma unroll 1
    for (int other = 0; other < size_ - 1; ++other) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        if (i < first_ || i >= end_) continue;
        const float4 more = *reinterpret_cast<const float4*>(part(other, i - first_));
        sum[4 * i] += more.x;
        sum[4 * i + 1] += more.y;
        sum[4 * i + 2] += more.z;
        sum[4 * i + 3] += more.w;
      }
    }
    device::fence_async_proxy();  // stages come to this place next
    __syncwarp();
    if (lane_ == 0) device::barrier_arrive(&barriers_.sums_read, 1);
    parity_ ^= 1;
  }

  __device__ int first_row() const { return first_ * 8; }
  __device__ int end_row() const { return end_ * 8; }

 private:
  static constexpr int kEightBytes = 256 * 16;  // eight rows of x by 128 of the weight

  /// This thread's part of an eight of the owner's; `other` counts the ranks but the owner's.
  __device__ std::uint8_t* part(int other, int eight) const {
    return shared_ + (other * share_ + eight) * kEightBytes;
  }

  typename Ring::Barriers& barriers_;
  std::uint8_t* shared_;
  int rank_, size_, warp_, lane_;
  int share_ = 0, first_ = 0, end_ = 0;  // eights
  unsigned parity_ = 0;
};

/// Add the bias, round once and store rows `first` .. `end` - 1 of a tile. Values of 16 bits pass
/// through `staged`, 64 rows of out at a time, so that eight lanes write 128 bytes of a row; one
/// warp group calls it.
template <class X, int kRows>
__device__ void store_rows(const ProductArgs& p, const HopperTile& tile, int first, int end,
                           std::uint8_t* staged, float (&sum)[kRows / 2], int warp, int lane) {
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
      if (row >= first && row < end && column < p.n) {
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
    if (pass * 64 + 64 <= first) continue;
    if (pass * 64 >= end) break;
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
      if (pass * 64 + row < first || pass * 64 + row >= end) continue;
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
