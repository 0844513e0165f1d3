// What the copying and the multiplying warps of hopper.cuh agree on: tiles and rings.
#pragma once
#include "device/bulk.cuh"
#include "gemm/arguments.cuh"
#include "gemm/layout.cuh"

namespace fastgpt::gemm {

inline constexpr int kHopperN = 128;       // weight rows of a tile
inline constexpr int kHopperColumns = 64;  // columns of a stage of x
inline constexpr int kHopperBand = 8;      // row tiles whose x stays in L2 while weights pass by

/// Stages in shared memory: x first, then the weight, then 64 rows of out on their way to memory.
template <WeightFormat kFormat, int kRows>
struct HopperRing {
  static constexpr bool kDense = kFormat == WeightFormat::kDense;
  static constexpr bool kInt4 = kFormat == WeightFormat::kInt4;
  static constexpr int kColumns = kDense ? 64 : kBlockCols;  // of a stage of the weight
  static constexpr int kParts = kColumns / kHopperColumns;   // stages of x beside it
  static constexpr int kCodeBytes = kHopperN * kColumns * (kDense ? 4 : kInt4 ? 1 : 2) / 2;
  static constexpr int kTileBytes = kCodeBytes / (kHopperN / kTileN);        // 16 weight rows
  static constexpr int kBlobs = kDense ? 0 : kColumns / blob_cols(kFormat);  // of these
  static constexpr int kLines = kBlobs * kBlobBytes / 128;
  static constexpr int kScaleBytes = kInt4 ? kHopperN * 4 * 2 : 0;  // groups of 32
  static constexpr int kZeroBytes = kInt4 ? kHopperN * 4 : 0;
  static constexpr int kWeightBytes = (kCodeBytes + kScaleBytes + kZeroBytes + 1023) / 1024 * 1024;
  static constexpr int kXBytes = kRows * kHopperColumns * 2;

  static constexpr int kBytes = 208 << 10;  // for both rings
  static constexpr int kPackedCount = kRows >= 192 ? 3 : kRows == 128 ? 4 : kInt4 ? 8 : 6;
  static constexpr int kWeightCount = kDense ? kBytes / (kWeightBytes + kXBytes) : kPackedCount;
  static constexpr int kXMost = (kBytes - kWeightCount * kWeightBytes) / kXBytes;
  static constexpr int kXCount = kDense ? kWeightCount : kXMost < 16 ? kXMost : 16;
  static constexpr int kWeightStart = kXCount * kXBytes;
  static constexpr int kOutStart = kWeightStart + kWeightCount * kWeightBytes;
  static constexpr int kOutBytes = kHopperN * 64 * 2;
  static constexpr int kSharedBytes = kOutStart + kOutBytes + 1024;  // and alignment to 1 KiB
  static_assert((kRows / 8 + 7) * 4096 <= kOutStart);  // sums of a split tile, see SplitSums
  static_assert(kSharedBytes <= (227 << 10) - 1536);   // barriers and rows beside it

  struct Barriers {
    std::uint64_t weight_full[kWeightCount];
    std::uint64_t weight_empty[kWeightCount];
    std::uint64_t x_full[kXCount];
    std::uint64_t x_empty[kXCount];
    std::uint64_t sums_free;  // split tiles: the rings of all CTAs have room for sums,
    std::uint64_t sums_full;  // the sums of the others are here,
    std::uint64_t sums_read;  // and stages may come again

    /// One thread calls it, which may start copies next; the others meet it afterwards.
    /// @param x_writers arrivals that complete a stage of x, beside its bytes
    /// @param shares CTAs that share x
    /// @param size CTAs of the cluster
    __device__ void init(unsigned x_writers, unsigned shares, unsigned size) {
      for (int i = 0; i < kWeightCount; ++i) {
        device::barrier_init(&weight_full[i], 1);
        device::barrier_init(&weight_empty[i], kDense ? 2 : 8);  // groups, or warps
      }
      for (int i = 0; i < kXCount; ++i) {
        device::barrier_init(&x_full[i], x_writers);
        device::barrier_init(&x_empty[i], 2 * shares);
      }
      device::barrier_init(&sums_free, 8 * size);  // warps
      device::barrier_init(&sums_full, 1);
      device::barrier_init(&sums_read, 8);
      device::barrier_init_fence();
      device::fence_async_proxy();
    }
  };
};

/// Place in a ring.
template <int kCount>
struct RingPlace {
  int slot = 0;
  unsigned parity = 0;  // of the phase that fills the slot
  __device__ void advance() {
    if (++slot == kCount) {
      slot = 0;
      parity ^= 1;
    }
  }
};

/// Division of numbers below 2^31 by one that the host knows: two instructions instead of twenty.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(unsigned divisor) : divisor_(divisor) {
    while ((1ULL << shift_) < divisor) ++shift_;
    magic_ = unsigned(((1ULL << 32) * ((1ULL << shift_) - divisor)) / divisor + 1);
  }
  __device__ int divide(int number, int& rest) const {
    const auto quotient = int((__umulhi(unsigned(number), magic_) + unsigned(number)) >> shift_);
    rest = number - quotient * int(divisor_);
    return quotient;
  }

 private:
  unsigned divisor_ = 1;
  unsigned magic_ = 1;
  unsigned shift_ = 0;
};

struct HopperArgs {
  CUtensorMap x;        // boxes of kRows rows
  CUtensorMap x_share;  // of kRows / num_shares
  CUtensorMap weight;   // dense rows, or blobs of codes
  CUtensorMap scale;    // int4
  CUtensorMap zero_point;
  ProductArgs product;
  int row_tiles;
  int num_tiles;    // of all heads
  int whole_tiles;  // of these, the first ones; the others are split
  int num_shares;   // CTAs that share x in whole rounds: the cluster, or 1
  Divisor per_batch, per_band, shares, per_cluster;
  Divisor rows_of_band[2];  // of a whole band and of the last one, if shorter
};

/// A tile, and the weight stages of it that one CTA sums up.
struct HopperTile {
  int weight;    // tile of weight rows
  RowTile rows;  // of x, of one head
  int begin;
  int end;
  bool is_split;
};

/// The tiles of one CTA, in order.
template <int kRows>
class HopperTiles {
 public:
  __device__ HopperTiles(const HopperArgs& args, int num_stages)
      : args_(args),
        num_stages_(num_stages),
        rank_(int(device::cluster_rank())),
        size_(int(device::cluster_size())),
        num_clusters_(int(device::num_clusters())),
        next_whole_(int(device::cluster_id())),
        next_split_(next_whole_) {
    int rest = 0;
    split_begin_ = args.per_cluster.divide(num_stages * rank_, rest);
    split_end_ = args.per_cluster.divide(num_stages * (rank_ + 1), rest);
  }

  /// A whole warp calls it. Every CTA of a cluster that shares x or sums gets the same number of
  /// tiles of each kind.
  __device__ bool next(HopperTile& tile) {
    do {
      int index = next_whole_ * size_ + rank_;
      tile.begin = 0;
      tile.end = num_stages_;
      tile.is_split = index >= args_.whole_tiles;
      if (!tile.is_split) {
        next_whole_ += num_clusters_;
      } else {
        index = args_.whole_tiles + next_split_;
        if (index >= args_.num_tiles) return false;
        tile.begin = split_begin_;
        tile.end = split_end_;
        next_split_ += num_clusters_;
      }
      // Bands of row tiles; in a band all row tiles of the same weight tiles before the next ones.
      int rest = 0, share = 0, row = 0;
      const int batch = args_.per_batch.divide(index, rest);
      const int band = args_.per_band.divide(rest, rest);
      const int group = args_.shares.divide(rest, share);
      const bool is_short = (band + 1) * kHopperBand > args_.row_tiles;
      tile.weight = args_.rows_of_band[is_short].divide(group, row) * args_.num_shares + share;
      tile.rows = row_tile<kRows>(args_.product, band * kHopperBand + row, batch);
    } while (tile.rows.count <= 0);  // behind the last row of the last expert
    return true;
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }
  __device__ int num_stages() const { return num_stages_; }

 private:
  const HopperArgs& args_;
  int num_stages_;
  int rank_;
  int size_;
  int num_clusters_;
  int split_begin_;  // stages of this CTA of a split tile
  int split_end_;
  int next_whole_;
  int next_split_;
};

}  // namespace fastgpt::gemm
