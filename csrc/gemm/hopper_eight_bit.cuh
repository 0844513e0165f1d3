// Products of eight-bit rows with eight-bit weights on Hopper: wgmma on codes as they lie in
// memory, both operands from shared memory. Tiles, clusters and stores are hopper.cuh's:
//
//                x rows ─► 0 .. kRows - 1
//     weight  0 ..  63     warps 0-3        a stage: 128 columns of all rows and of the weight,
//            64 .. 127     warps 4-7        and the rows' scales of these columns (of all columns:
//     copies               warp 8           with the last stage)
//
// Neither operand is in the order of columns: both are in the order of the packed weight
// (layout.cuh), which quantize_rows writes too, and a sum over columns has no order.
//
// e4m3: tensor cores add with about 14 bits, so the sums of each stage start at zero and are added,
// times the scales of its groups, to float32 sums of their own: 2 x kRows / 2 registers, which is
// why tiles end at 192 rows. While one warp group adds, the other one multiplies.
// int8: sums are exact; one set, and tiles of 256 rows.
#pragma once
#include "device/blobs.cuh"
#include "device/dependent.cuh"
#include "device/wgmma_eight_bit.cuh"
#include "gemm/hopper_ring.cuh"
#include "gemm/hopper_store.cuh"

namespace fastgpt::gemm {

inline constexpr int kEightBitThreads = 384;  // three warp groups: registers move between groups

struct EightBitArgs {
  HopperArgs tiles;  // its maps of x count pairs of codes
  CUtensorMap weight;
  const float* x_scale;         // [groups or 1][x_scale_stride]
  std::int64_t x_scale_stride;  // a multiple of 4
  const float* weight_scale;    // [n], or [ceil(n / 128)][stages] with groups
};

template <int kRows>
struct EightBitRing {
  static constexpr int kColumns = 128;
  static constexpr int kXBytes = kRows * kColumns;
  static constexpr int kBlobColumns = 64;  // of one copy of the weight
  static constexpr int kWeightBytes = kHopperN * kColumns;
  static constexpr int kScaleBytes = kRows * 4;
  static constexpr int kCount = (208 << 10) / (kXBytes + kWeightBytes);
  static constexpr int kWeightStart = kCount * kXBytes;
  static constexpr int kOutStart = kWeightStart + kCount * kWeightBytes;
  static constexpr int kOutBytes = kHopperN * 64 * 2;
  static constexpr int kScaleStart = kOutStart + kOutBytes;
  static constexpr int kSharedBytes = kScaleStart + kCount * kScaleBytes + 1024;  // alignment
  static_assert((kRows / 8 + 7) * 4096 <= kOutStart);  // sums of a split tile, see SplitSums
  static_assert(kSharedBytes <= (227 << 10) - 1024);   // barriers beside it

  struct Barriers {
    std::uint64_t full[kCount];
    std::uint64_t empty[kCount];
    std::uint64_t sums_free;  // these three as HopperRing's
    std::uint64_t sums_full;
    std::uint64_t sums_read;
  };
};

/// The copying warp, one lane of it: asks for every stage of the CTA's tiles as its slot is free.
template <int kRows, bool kGroups>
class EightBitCopies {
 public:
  using Ring = EightBitRing<kRows>;

  __device__ EightBitCopies(const EightBitArgs& args, typename Ring::Barriers& barriers,
                            std::uint8_t* shared)
      : args_(args), barriers_(barriers), shared_(shared) {}

  /// @param dependent the kernel's: weights are asked for ahead of its wait, x behind it.
  __device__ void run(const device::Dependent<EightBitArgs>& dependent, HopperTiles<kRows> tiles,
                      int lane) {
    if (lane == 0) {
      device::prefetch_map(args_.tiles.x);
      device::prefetch_map(args_.weight);
    }
    const int share = kRows / args_.tiles.num_shares * tiles.rank();  // first row of this part
    HopperTile tile;
    bool more = tiles.next(tile);
    int ahead = 0;
    if (more) {
      RingPlace<Ring::kCount> place;
      for (; ahead < Ring::kCount && tile.begin + ahead < tile.end; ++ahead) {
        if (lane == 0) fetch_weight(tile, tile.begin + ahead, place.slot);
        place.advance();
      }
    }
    dependent.wait();
    unsigned sums_parity = 0;
    while (more) {
      for (int stage = tile.begin; stage < tile.end; ++stage) {
        if (ahead > 0) {
          --ahead;
        } else {
          device::barrier_wait(&barriers_.empty[place_.slot], place_.parity ^ 1);
          if (lane == 0) fetch_weight(tile, stage, place_.slot);
        }
        if (lane == 0) fetch_x(tile, stage, share);
        place_.advance();
      }
      __syncwarp();
      if (tile.is_split) {  // the ring holds sums now, and is free again
        device::barrier_wait(&barriers_.sums_read, sums_parity);
        sums_parity ^= 1;
      }
      more = tiles.next(tile);
    }
  }

 private:
  /// Announce the whole stage and ask for its weights.
  __device__ void fetch_weight(const HopperTile& tile, int stage, int slot) {
    std::uint64_t* full = &barriers_.full[slot];
    device::barrier_expect(full, Ring::kXBytes + Ring::kWeightBytes + scale_bytes(tile, stage));
    std::uint8_t* to = shared_ + Ring::kWeightStart + slot * Ring::kWeightBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at[4] = {0, 0, 2 * stage + half, tile.weight * (kHopperN / kTileN)};
      device::copy_box(to + half * (Ring::kWeightBytes / 2), args_.weight, full, at);
    }
  }

  __device__ void fetch_x(const HopperTile& tile, int stage, int share) {
    std::uint64_t* full = &barriers_.full[place_.slot];
    std::uint8_t* to = shared_ + place_.slot * Ring::kXBytes;
    const int column = stage * (Ring::kColumns / 2);
    const int row = int(tile.rows.first);
    const int shares = args_.tiles.num_shares;
    if (tile.is_split || shares == 1) {
      device::copy_box(to, args_.tiles.x, full, column, row, 0);
    } else {
      device::copy_box_to(to + share * Ring::kColumns, args_.tiles.x_share, full, column,
                          row + share, 0, (1U << shares) - 1);
    }
    if (const unsigned bytes = scale_bytes(tile, stage); bytes != 0) {
      device::copy_bulk(shared_ + Ring::kScaleStart + place_.slot * Ring::kScaleBytes,
                        args_.x_scale + (kGroups ? stage * args_.x_scale_stride : 0) + row, bytes,
                        full);
    }
  }

  /// Bytes of the scales that come with a stage, a multiple of 16.
  __device__ unsigned scale_bytes(const HopperTile& tile, int stage) const {
    if (!kGroups && stage + 1 != tile.end) return 0;
    return 4 * unsigned(min(std::int64_t(kRows), args_.x_scale_stride - tile.rows.first));
  }

  const EightBitArgs& args_;
  typename Ring::Barriers& barriers_;
  std::uint8_t* shared_;
  RingPlace<Ring::kCount> place_;
};

/// One of eight multiplying warps: adds up the stages of a tile.
template <WeightFormat kFormat, int kRows, bool kGroups>
class EightBitSums {
 public:
  using Ring = EightBitRing<kRows>;
  using Sum = float[kRows / 2];
  static constexpr bool kInt8 = kFormat == WeightFormat::kInt8;
  static_assert(!(kInt8 && kGroups));

  __device__ EightBitSums(const EightBitArgs& args, typename Ring::Barriers& barriers,
                          std::uint8_t* shared, int warp, int lane)
      : args_(args), barriers_(barriers), shared_(shared), warp_(warp), lane_(lane) {}

  /// sum = weight x^T of this warp's 16 weight rows, scaled.
  __device__ void run(const HopperTile& tile, int num_stages, Sum& sum) {
    if constexpr (kInt8) {
      run_exact(tile, sum);
    } else {
      run_in_steps(tile, num_stages, sum);
    }
    if (kGroups || tile.begin == tile.end) return;
    scale(tile, sum);
    warp_ < 4 ? device::named_barrier<1>(128) : device::named_barrier<2>(128);
    release(tile);  // all warps of the group have read the scales
    place_.advance();
  }

 private:
  __device__ void run_exact(const HopperTile& tile, Sum& sum) {
    int exact[kRows / 2];
#pragma unroll
    for (int& value : exact) value = 0;
    device::wgmma_hold(exact);  // else the first round is peeled off and its products serialized
#pragma unroll 1
    for (int stage = tile.begin; stage < tile.end; ++stage) {
      device::barrier_wait(&barriers_.full[place_.slot], place_.parity);
      multiply<true>(exact);
      device::wgmma_wait<1>();
      if (stage > tile.begin) release(tile);
      if (stage + 1 < tile.end) place_.advance();
    }
    device::wgmma_wait<0>();
    device::wgmma_hold(exact);
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) sum[i] = float(exact[i]);
  }

  __device__ void run_in_steps(const HopperTile& tile, int num_stages, Sum& sum) {
    float step[kRows / 2];
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) sum[i] = step[i] = 0.0F;
    const float* block_scales = nullptr;
    if constexpr (kGroups) {
      const std::int64_t last = (args_.tiles.product.n - 1) / kHopperN;
      block_scales = args_.weight_scale + min(std::int64_t(tile.weight), last) * num_stages;
    }
#pragma unroll 1
    for (int stage = tile.begin; stage < tile.end; ++stage) {
      const float block_scale = kGroups ? block_scales[stage] : 1.0F;
      device::barrier_wait(&barriers_.full[place_.slot], place_.parity);
      multiply<false>(step);
      device::wgmma_wait<0>();
      device::wgmma_hold(step);
      if constexpr (kGroups) {
        const auto* scales = reinterpret_cast<const float2*>(shared_ + Ring::kScaleStart +
                                                             place_.slot * Ring::kScaleBytes);
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const float2 rows = scales[j * 4 + lane_ % 4];
          const float factor[2] = {rows.x * block_scale, rows.y * block_scale};
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[4 * j + i] += step[4 * j + i] * factor[i % 2];
        }
        release(tile);
        place_.advance();
      } else {
        const bool is_last = stage + 1 == tile.end;  // its scales are still to be read
        if (!is_last) release(tile);
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) sum[i] += step[i];
        if (!is_last) place_.advance();
      }
    }
  }

  /// Start the four products of the current stage.
  template <bool kAdd, class Value>
  __device__ void multiply(Value (&sum)[kRows / 2]) const {
    const std::uint64_t a = device::wgmma_operand_64(
        device::smem_address(shared_ + Ring::kWeightStart + place_.slot * Ring::kWeightBytes +
                             warp_ / 4 * (Ring::kWeightBytes / 4)));
    const std::uint64_t b =
        device::wgmma_operand(device::smem_address(shared_ + place_.slot * Ring::kXBytes));
    constexpr int kSecondBlob = Ring::kWeightBytes / 2 / 16;
    device::wgmma_hold(sum);
    device::wgmma_fence();
    device::wgmma_eight_bit<kAdd>(sum, a, b);
    device::wgmma_eight_bit<true>(sum, a + 2, b + 2);
    device::wgmma_eight_bit<true>(sum, a + kSecondBlob, b + 4);
    device::wgmma_eight_bit<true>(sum, a + kSecondBlob + 2, b + 6);
    device::wgmma_commit();
  }

  /// The scales of rows, in the last stage, and of channels: the same for all columns.
  __device__ void scale(const HopperTile& tile, Sum& sum) const {
    const ProductArgs& p = args_.tiles.product;
    float channel[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t n =
          std::int64_t(tile.weight) * kHopperN + sum_column(2 * half, lane_, warp_);
      channel[half] = n < p.n ? args_.weight_scale[n] : 0.0F;
    }
    const auto* scales = reinterpret_cast<const float2*>(shared_ + Ring::kScaleStart +
                                                         place_.slot * Ring::kScaleBytes);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 rows = scales[j * 4 + lane_ % 4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[4 * j + 2 * half] *= rows.x * channel[half];
        sum[4 * j + 2 * half + 1] *= rows.y * channel[half];
      }
      if (j % 8 == 7) asm volatile("" ::: "memory");  // else registers are asked for all scales
    }
  }

  /// Hand the oldest stage back to those who fill it: a warp group's first warp when the group's
  /// products are done, every warp where it has read scales.
  __device__ void release(const HopperTile& tile) {
    std::uint64_t* empty = &barriers_.empty[done_.slot];
    done_.advance();
    if constexpr (kGroups) {
      __syncwarp();
    } else {
      if (warp_ % 4 != 0) return;
    }
    const int shares = args_.tiles.num_shares;
    if (tile.is_split || shares == 1) {
      if (lane_ == 0) device::barrier_arrive(empty, unsigned(shares));
    } else if (lane_ < shares) {
      device::barrier_arrive_at(empty, unsigned(lane_));
    }
  }

  const EightBitArgs& args_;
  typename Ring::Barriers& barriers_;
  std::uint8_t* shared_;
  int warp_, lane_;
  RingPlace<Ring::kCount> place_, done_;
};

// The mapping of hopper_kernel. X: type of out where that has 16 bits.
template <WeightFormat kFormat, class X, int kRows, bool kGroups>
__global__ void __launch_bounds__(kEightBitThreads, 1)
    eight_bit_kernel(const __grid_constant__ device::Dependent<EightBitArgs> dependent) {
#ifdef FASTGPT_HAS_WGMMA
  using Ring = EightBitRing<kRows>;
  extern __shared__ std::uint8_t raw_shared[];
  __shared__ typename Ring::Barriers barriers;
  std::uint8_t* const shared = raw_shared + (1024 - device::smem_address(raw_shared) % 1024) % 1024;

  const EightBitArgs& args = dependent.constants();
  const ProductArgs& p = args.tiles.product;
  const int lane = int(threadIdx.x) % 32;
  const int warp = __shfl_sync(~0U, int(threadIdx.x) / 32, 0);  // the same register in all lanes
  HopperTiles<kRows> tiles(args.tiles, int(ceil_div(p.k, Ring::kColumns)));

  if (threadIdx.x == 0) {
    for (int i = 0; i < Ring::kCount; ++i) {
      device::barrier_init(&barriers.full[i], 1);
      device::barrier_init(&barriers.empty[i], unsigned((kGroups ? 8 : 2) * args.tiles.num_shares));
    }
    device::barrier_init(&barriers.sums_free, unsigned(8 * tiles.size()));  // warps
    device::barrier_init(&barriers.sums_full, 1);
    device::barrier_init(&barriers.sums_read, 8);
    device::barrier_init_fence();
  }
  tiles.size() > 1 ? device::cluster_sync_relaxed() : __syncthreads();

  if (warp >= 8) {
    device::give_back_registers<40>();
    if (warp > 8) {
      dependent.wait();
      return;  // a barrier of the cluster counts those who are left
    }
    EightBitCopies<kRows, kGroups> copies(args, barriers, shared);
    copies.run(dependent, tiles, lane);
  } else {
    device::take_registers<232>();
    dependent.wait();
    EightBitSums<kFormat, kRows, kGroups> sums(args, barriers, shared, warp, lane);
    SplitSums<Ring, kRows> split(barriers, shared, tiles.rank(), tiles.size(), warp, lane);
    std::uint8_t* const staged = shared + Ring::kOutStart + warp / 4 * (Ring::kOutBytes / 2);
    float sum[kRows / 2];
    HopperTile tile;
    while (tiles.next(tile)) {
      sums.run(tile, tiles.num_stages(), sum);
      int first = 0, end = tile.rows.count;
      if (tile.is_split) {
        split.add(sum, tile.rows.count);
        first = split.first_row();
        end = min(end, split.end_row());
      }
      store_rows<X, kRows>(p, tile, first, end, staged, sum, warp, lane);
    }
  }
  // Nobody leaves while others still send to it.
  if (tiles.size() > 1) device::cluster_sync_relaxed();
#else
  dependent.wait();
#endif
}

}  // namespace fastgpt::gemm
