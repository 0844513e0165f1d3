// The copying warps of hopper.cuh: they keep the rings filled ahead of the products.
#pragma once
#include "device/bulk.cuh"
#include "gemm/hopper_ring.cuh"

namespace fastgpt::gemm {

/// The warp that asks for stages of the weight as slots become free. One lane walks over a tile,
/// a few hundred cycles a stage: what is the same for a tile is worked out ahead.
template <WeightFormat kFormat, int kRows>
class HopperWeights {
 public:
  using Ring = HopperRing<kFormat, kRows>;

  __device__ HopperWeights(const HopperArgs& args, typename Ring::Barriers& barriers,
                           std::uint8_t* shared, const HopperTiles<kRows>& tiles)
      : args_(args), barriers_(barriers), shared_(shared), tiles_(tiles) {
    if constexpr (Ring::kInt4) {
      scale_bytes_ = kBlockCols / unsigned(args.product.group_size) * kHopperN * 2;
      zero_bytes_ = args.product.zero_point != nullptr ? scale_bytes_ / 2 : 0;
    }
  }

  /// The first ones: weights are constants, nobody needs to be waited for.
  __device__ void run_ahead() {
    more_ = tiles_.next(tile_);
    ahead_ = more_ ? min(tile_.end - tile_.begin, Ring::kWeightCount) : 0;
    if (device::elect_lane()) {
      device::prefetch_map(args_.weight);
      for (int i = 0; i < ahead_; ++i) fetch(tile_.begin + i);
    }
    __syncwarp();
  }

  __device__ void run() {
    unsigned sums_parity = 0;
    while (more_) {
      if (device::elect_lane()) {
        for (int stage = tile_.begin + ahead_; stage < tile_.end; ++stage) fetch(stage);
      }
      __syncwarp();
      if (tile_.is_split) {  // the rings hold sums now, and are free again
        device::barrier_wait(&barriers_.sums_read, sums_parity);
        sums_parity ^= 1;
      }
      more_ = tiles_.next(tile_);
      ahead_ = 0;
    }
  }

 private:
  __device__ void fetch(int stage) {
    const int row = tile_.weight * kHopperN;
    const int batch = tile_.rows.weight;
    std::uint8_t* to = shared_ + Ring::kWeightStart + place_.slot * Ring::kWeightBytes;
    std::uint64_t* full = &barriers_.weight_full[place_.slot];
    device::barrier_wait(&barriers_.weight_empty[place_.slot], place_.parity ^ 1);
    place_.advance();
    device::barrier_expect(full, Ring::kCodeBytes + scale_bytes_ + zero_bytes_);
    if constexpr (Ring::kDense) {
      device::copy_box(to, args_.weight, full, stage * Ring::kColumns, row, batch);
    } else {
      const int tile = row / kTileN;
      device::copy_box(to, args_.weight, full, {0, stage * Ring::kLines, tile, batch});
      if constexpr (Ring::kInt4) {
        to += Ring::kCodeBytes;
        device::copy_box(to, args_.scale, full, {0, stage, tile, batch});
        to += Ring::kScaleBytes;
        if (zero_bytes_ != 0) {
          device::copy_box(to, args_.zero_point, full, {0, stage, tile, batch});
        }
      }
    }
  }

  const HopperArgs& args_;
  typename Ring::Barriers& barriers_;
  std::uint8_t* shared_;
  HopperTiles<kRows> tiles_;
  unsigned scale_bytes_ = 0, zero_bytes_ = 0;  // of a stage
  HopperTile tile_;
  bool more_ = false;
  int ahead_ = 0;  // stages of the tile that were asked for
  RingPlace<Ring::kWeightCount> place_;
};

/// The warp that does the same for x.
template <WeightFormat kFormat, int kRows>
class HopperRows {
 public:
  using Ring = HopperRing<kFormat, kRows>;

  __device__ HopperRows(const HopperArgs& args, typename Ring::Barriers& barriers,
                        std::uint8_t* shared)
      : args_(args), barriers_(barriers), shared_(shared) {}

  __device__ void run(HopperTiles<kRows> tiles) {
    int rest = 0;
    const int share = args_.shares.divide(kRows, rest) * tiles.rank();  // first row it sends
    unsigned sums_parity = 0;
    HopperTile tile;
    while (tiles.next(tile)) {
      const bool alone = tile.is_split || args_.num_shares == 1;
      if (device::elect_lane()) {
        for (int i = tile.begin * Ring::kParts; i < tile.end * Ring::kParts; ++i) {
          std::uint8_t* to = shared_ + place_.slot * Ring::kXBytes;
          std::uint64_t* full = &barriers_.x_full[place_.slot];
          device::barrier_wait(&barriers_.x_empty[place_.slot], place_.parity ^ 1);
          place_.advance();
          device::barrier_expect(full, Ring::kXBytes);
          const int column = i * kHopperColumns;
          const int row = int(tile.rows.first);
          if (alone) {
            device::copy_box(to, args_.x, full, column, row, tile.rows.weight);
          } else {
            device::copy_box_to(to + share * 128, args_.x_share, full, column, row + share,
                                tile.rows.weight, (1U << args_.num_shares) - 1);
          }
        }
      }
      __syncwarp();
      if (tile.is_split) {
        device::barrier_wait(&barriers_.sums_read, sums_parity);
        sums_parity ^= 1;
      }
    }
  }

 private:
  const HopperArgs& args_;
  typename Ring::Barriers& barriers_;
  std::uint8_t* shared_;
  RingPlace<Ring::kXCount> place_;
};

/// Two warps that do it for rows of experts, which lie apart, where TMA does not find them.
/// Thread 8 i + j copies chunk j of every eighth row from i on.
template <WeightFormat kFormat, int kRows>
class HopperGather {
 public:
  using Ring = HopperRing<kFormat, kRows>;
  static constexpr int kThreads = 64;
  static constexpr int kStep = kThreads / 8;  // rows at once
  static constexpr int kBatch = 8;            // copies of a thread in a row
  /// Rows of x: those of a thread side by side.
  using XRows = int[kStep][kRows / kStep];

  __device__ HopperGather(const ProductArgs& p, typename Ring::Barriers& barriers,
                          std::uint8_t* shared, XRows& x_rows, int thread)
      : p_(p), barriers_(barriers), shared_(shared), x_rows_(x_rows), thread_(thread) {}

  __device__ void run(HopperTiles<kRows> tiles) {
    const int first = thread_ / 8, chunk = thread_ % 8;
    const int to = first * 128 + (chunk ^ first) * 16;
    HopperTile tile;
    while (tiles.next(tile)) {
      device::named_barrier<3>(kThreads);  // both warps have left the tile before
      for (int row = thread_; row < kRows; row += kThreads) {
        // What stands behind the last row is multiplied, but not stored.
        const std::int64_t position = tile.rows.first + min(row, tile.rows.count - 1);
        x_rows_[row % kStep][row / kStep] = int(p_.sorted_rows[position] / p_.rows_per_token);
      }
      device::named_barrier<3>(kThreads);
      const int num_parts = (tile.end - tile.begin) * Ring::kParts;
      for (int part = 0; part < num_parts; ++part) {
        const std::int64_t column = std::int64_t(part) * kHopperColumns + chunk * 8;
        std::uint8_t* stage = shared_ + place_.slot * Ring::kXBytes + to;
        std::uint64_t* full = &barriers_.x_full[place_.slot];
        device::barrier_wait(&barriers_.x_empty[place_.slot], place_.parity ^ 1);
        place_.advance();
        const int bytes = max(0, min(16, int(p_.k - column) * 2));
        const auto* x = static_cast<const std::uint16_t*>(p_.x) + (bytes > 0 ? column : 0);
        const int stride = int(p_.x_stride);
#pragma unroll 1
        for (int i = 0; i < kRows / kStep; i += kBatch) {
          int rows[kBatch];  // read first: a read between copies would wait for them
#pragma unroll
          for (int j = 0; j < kBatch; ++j) rows[j] = x_rows_[first][i + j];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            device::copy_async_16(stage + (i + j) * kStep * 128, x + std::int64_t(rows[j]) * stride,
                                  bytes);
          }
        }
        device::barrier_arrive_after_copies(full);
      }
    }
  }

 private:
  const ProductArgs& p_;
  typename Ring::Barriers& barriers_;
  std::uint8_t* shared_;
  XRows& x_rows_;
  int thread_;
  RingPlace<Ring::kXCount> place_;
};

}  // namespace fastgpt::gemm
