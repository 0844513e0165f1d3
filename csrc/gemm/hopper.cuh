// Products for many rows of x on Hopper: warp-group products (wgmma) over rings filled by TMA.
//
// One CTA owns 128 weight rows and kRows rows of x, and computes out^T = weight x^T: the weight is
// the first operand of the product, so that quantized codes can become operands in registers, and
// rows of x come in any multiple of 64. Two warp groups own 64 weight rows each; two more warps
// ask for the stages ahead of them:
//
//                x rows ─► 0 .. kRows - 1
//     weight  0 ..  63     warps 0-3        a stage of x: 64 columns of all rows
//            64 .. 127     warps 4-7        of the weight: 64 columns (dense) or 128 (packed)
//     copies               warp 8, of x warp 9 (of experts 9 and 10)
//
// A cluster of CTAs works in rounds, whole tiles first, then split ones:
//   whole  every CTA takes another weight tile of the same rows of x, fetches its share of x and
//          sends it to all;
//   split  all CTAs take the same tile and a part of its columns each; the sums meet through
//          distributed shared memory. So the last tiles, or the only ones, fill the device too.
//
// Scales of groups along the columns: sums are kept in units of the current group's scale and
// change unit, times old / new in float32, before the next group's products: a second set of sums
// would not fit in registers. Codes enter the products as exact small numbers. Sums stay finite
// up to 3e38 times the smallest scale of the row that is not 0.
#pragma once
#include "device/dependent.cuh"
#include "device/wgmma.cuh"
#include "gemm/hopper_copies.cuh"
#include "gemm/hopper_operands.cuh"
#include "gemm/hopper_store.cuh"

namespace fastgpt::gemm {

/// Three warp groups, because registers move from group to group.
inline constexpr int kHopperThreads = 384;

/// One of eight multiplying warps: adds up the stages of a tile.
template <WeightFormat kFormat, class X, int kRows, Scales kScales, bool kGathered>
class HopperSums {
 public:
  using Ring = HopperRing<kFormat, kRows>;
  using Sum = float[kRows / 2];

  __device__ HopperSums(const HopperArgs& args, typename Ring::Barriers& barriers,
                        std::uint8_t* shared, int warp, int lane)
      : p_(args.product),
        shares_(args.num_shares),
        barriers_(barriers),
        shared_(shared),
        warp_(warp),
        lane_(lane) {}

  /// sum = weight x^T of this warp's 16 weight rows.
  __device__ void run(const HopperTile& tile, int num_stages, Sum& sum) {
#pragma unroll
    for (float& value : sum) value = 0.0F;
    device::wgmma_hold(sum);  // else the first round is peeled off and its products serialized
    if constexpr (Ring::kDense) {
      run_dense(tile, sum);
    } else if (tile.begin < tile.end) {
      run_packed(tile, num_stages, sum);
    }
  }

 private:
  __device__ void run_dense(const HopperTile& tile, Sum& sum) {
    const auto release = [&] {
      if (warp_ % 4 == 0 && lane_ == 0) {
        device::barrier_arrive(&barriers_.weight_empty[weight_done_.slot], 1);
      }
      weight_done_.advance();
      release_x(tile);
    };
#pragma unroll 1
    for (int stage = tile.begin; stage < tile.end; ++stage) {
      device::barrier_wait(&barriers_.weight_full[weight_.slot], weight_.parity);
      wait_x();
      const std::uint64_t a = device::wgmma_operand(
          device::smem_address(weight_stage() + warp_ / 4 * (Ring::kWeightBytes / 2)));
      const std::uint64_t b = device::wgmma_operand(device::smem_address(x_stage()));
      device::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) device::wgmma<X>(sum, a + 2 * i, b + 2 * i);
      device::wgmma_commit();
      device::wgmma_wait<1>();
      if (stage > tile.begin) release();
      weight_.advance();
      x_.advance();
    }
    device::wgmma_wait<0>();
    device::wgmma_hold(sum);
    if (tile.begin < tile.end) release();
  }

  // The operands of one part are made behind the products of the part before.
  __device__ void run_packed(const HopperTile& tile, int num_stages, Sum& sum) {
    using Operands = HopperOperands<kFormat, X, kScales>;
    constexpr bool kSlots = kScales == Scales::kGroup32;  // the unit changes within a part
    constexpr int kFirst = kSlots ? 2 : 4;                // products up to there
    Operands operands(p_, lane_, warp_);
    std::uint32_t a[2][4][4];
    float change[2][Operands::kScaleSlots][2];
    const float* block_scales = nullptr;  // fp8, one scale per 128 x 128
    if (kFormat == WeightFormat::kFp8 && kScales == Scales::kGroup128) {
      const std::int64_t block = min(std::int64_t(tile.weight), (p_.n - 1) / kHopperN);
      block_scales = scales_of(tile) + block * num_stages;
    }
    const auto block_scale = [&](int stage) {
      return kFormat == WeightFormat::kFp8 && kScales == Scales::kGroup128 ? block_scales[stage]
                                                                           : 1.0F;
    };
    const auto finish = [&] {
      device::wgmma_wait<0>();
      device::wgmma_hold(sum);
    };

    float next_scale = block_scale(tile.begin);
    device::barrier_wait(&barriers_.weight_full[weight_.slot], weight_.parity);
    operands.template make<Ring, 0>(weight_stage(), next_scale, a[0], change[0]);
#pragma unroll 1
    for (int stage = tile.begin; stage < tile.end; ++stage) {
      const bool is_first = stage == tile.begin;
      const bool is_last = stage + 1 == tile.end;
      const float scale = next_scale;
      if (!is_last) next_scale = block_scale(stage + 1);

      if constexpr (kScales != Scales::kRow) {
        finish();
        if (!is_first) release_x(tile);
        change_units(sum, change[0][0]);
      }
      wait_x();
      multiply(sum, a[0], 0, kFirst);
      if constexpr (kScales == Scales::kRow) {
        device::wgmma_wait<1>();
        if (!is_first) release_x(tile);
      }
      operands.template make<Ring, 1>(weight_stage(), scale, a[1], change[1]);
      __syncwarp();
      if (lane_ == 0) device::barrier_arrive(&barriers_.weight_empty[weight_.slot], 1);
      weight_.advance();
      if constexpr (kSlots) {
        finish();
        change_units(sum, change[0][1]);
        multiply(sum, a[0], 2, 4);
      }
      x_.advance();

      if constexpr (kSlots) {
        finish();
        release_x(tile);
        change_units(sum, change[1][0]);
      }
      wait_x();
      multiply(sum, a[1], 0, kFirst);
      if constexpr (!kSlots) {
        device::wgmma_wait<1>();
        release_x(tile);
      }
      if (!is_last) {
        device::barrier_wait(&barriers_.weight_full[weight_.slot], weight_.parity);
        operands.template make<Ring, 0>(weight_stage(), next_scale, a[0], change[0]);
      }
      if constexpr (kSlots) {
        finish();
        change_units(sum, change[1][1]);
        multiply(sum, a[1], 2, 4);
      }
      x_.advance();
    }
    finish();
    release_x(tile);

    float unit[2] = {1.0F, 1.0F};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kScales != Scales::kRow) unit[half] = operands.unit(half);
      if constexpr (kHasChannelScale<kFormat>) {
        unit[half] *= kCodeUnit<kFormat, X>;
        const std::int64_t n =
            std::int64_t(tile.weight) * kHopperN + sum_column(2 * half, lane_, warp_);
        if (kScales == Scales::kRow && n < p_.n) {
          unit[half] *= scales_of(tile)[n];
        }
      }
    }
    change_units(sum, unit);
  }

  /// fp8 and int8
  __device__ const float* scales_of(const HopperTile& tile) const {
    const auto* bytes = static_cast<const std::uint8_t*>(p_.scale);
    return reinterpret_cast<const float*>(bytes + tile.rows.weight * p_.scale_batch_bytes);
  }

  static __device__ void change_units(Sum& sum, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) sum[i] *= factor[i / 2 % 2];
  }

  /// Start the products of 16 columns each, `from` .. `to` - 1, of the current stage of x.
  __device__ void multiply(Sum& sum, std::uint32_t (&a)[4][4], int from, int to) const {
    const std::uint64_t b = device::wgmma_operand(device::smem_address(x_stage()));
    device::wgmma_hold(sum);
#pragma unroll
    for (int i = from; i < to; ++i) device::wgmma_hold(a[i]);
    device::wgmma_fence();
#pragma unroll
    for (int i = from; i < to; ++i) device::wgmma<X>(sum, a[i], b + 2 * i);
    device::wgmma_commit();
    device::wgmma_hold(sum);
  }

  __device__ void wait_x() {
    device::barrier_wait(&barriers_.x_full[x_.slot], x_.parity);
    if constexpr (kGathered) device::fence_async_proxy();  // threads wrote it, products read it
  }

  /// Hand the oldest stage of x back to those who fill it.
  __device__ void release_x(const HopperTile& tile) {
    std::uint64_t* empty = &barriers_.x_empty[x_done_.slot];
    x_done_.advance();
    if (warp_ % 4 != 0) return;
    if (tile.is_split || shares_ == 1) {
      if (lane_ == 0) device::barrier_arrive(empty, unsigned(shares_));
    } else if (lane_ < shares_) {
      device::barrier_arrive_at(empty, unsigned(lane_));
    }
  }

  __device__ const std::uint8_t* weight_stage() const {
    return shared_ + Ring::kWeightStart + weight_.slot * Ring::kWeightBytes;
  }
  __device__ const std::uint8_t* x_stage() const { return shared_ + x_.slot * Ring::kXBytes; }

  const ProductArgs& p_;
  int shares_;
  typename Ring::Barriers& barriers_;
  std::uint8_t* shared_;
  int warp_, lane_;
  RingPlace<Ring::kWeightCount> weight_, weight_done_;
  RingPlace<Ring::kXCount> x_, x_done_;
};

// A ninth of the registers of an SM for each warp: __launch_bounds__ would count a tenth to
// twelfth.
/// @tparam kGathered rows of x lie apart: grouped products
template <WeightFormat kFormat, class X, int kRows, Scales kScales, bool kGathered>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_kernel(const __grid_constant__ device::Dependent<HopperArgs> dependent) {
#ifdef FASTGPT_HAS_WGMMA
  using Ring = HopperRing<kFormat, kRows>;
  using Gather = HopperGather<kFormat, kRows>;
  extern __shared__ std::uint8_t raw_shared[];
  __shared__ typename Ring::Barriers barriers;
  std::uint8_t* const shared = raw_shared + (1024 - device::smem_address(raw_shared) % 1024) % 1024;

  const HopperArgs& args = dependent.constants();
  const int lane = int(threadIdx.x) % 32;
  const int warp = __shfl_sync(~0U, int(threadIdx.x) / 32, 0);  // the same register in all lanes
  HopperTiles<kRows> tiles(args, int(ceil_div(args.product.k, Ring::kColumns)));

  // The first weights are on their way before the others are ready.
  HopperWeights<kFormat, kRows> weights(args, barriers, shared, tiles);
  if (warp == 8) {
    if (lane == 0) {
      barriers.init(kGathered ? Gather::kThreads : 1, unsigned(args.num_shares),
                    unsigned(tiles.size()));
    }
    __syncwarp();
    if constexpr (!kGathered) weights.run_ahead();
  } else if (warp == 9 && !kGathered && lane == 0) {
    device::prefetch_map(args.x);
  }
  __syncwarp();
  tiles.size() > 1 ? device::cluster_sync_relaxed() : __syncthreads();

  if (warp >= 8) {
    device::give_back_registers<56>();
    dependent.wait();
    if (warp == 8) {
      if constexpr (kGathered) weights.run_ahead();  // other kernels choose the experts of rows
      weights.run();
    } else if constexpr (kGathered) {
      __shared__ __align__(16) typename Gather::XRows x_rows;
      const int thread = int(threadIdx.x) - 9 * 32;
      if (thread < Gather::kThreads) {
        Gather(args.product, barriers, shared, x_rows, thread).run(tiles);
      }
    } else if (warp == 9) {
      HopperRows<kFormat, kRows>(args, barriers, shared).run(tiles);
    }
  } else {
    device::take_registers<224>();
    dependent.wait();
    HopperSums<kFormat, X, kRows, kScales, kGathered> sums(args, barriers, shared, warp, lane);
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
      store_rows<X, kRows>(args.product, tile, first, end, staged, sum, warp, lane);
    }
  }
  // Nobody leaves while others still send to it.
  if (tiles.size() > 1) device::cluster_sync_relaxed();
#else
  dependent.wait();
#endif
}

}  // namespace fastgpt::gemm
