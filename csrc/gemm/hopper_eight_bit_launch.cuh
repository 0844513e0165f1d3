// Launch of hopper_eight_bit.cuh's kernel.
#pragma once
#include "device/hopper.cuh"
#include "gemm/eight_bit_kernels.h"
#include "gemm/hopper_eight_bit.cuh"
#include "gemm/hopper_plan.h"

namespace fastgpt::gemm {

/// One per file of instances.
void hopper_fp8_rows_product(EightBitArgs& args, bool groups, const device::Traits& traits,
                             cudaStream_t stream);
void hopper_int8_rows_product(EightBitArgs& args, const device::Traits& traits,
                              cudaStream_t stream);

template <WeightFormat kFormat, class X, int kRows, bool kGroups>
void launch_eight_bit_kernel(EightBitArgs& args, const HopperPlan& plan, cudaStream_t stream) {
  using Ring = EightBitRing<kRows>;
  const ProductArgs& p = args.tiles.product;
  HopperArgs& tiles = args.tiles;
  // Boxes of 64 pairs of codes.
  const auto x_map = [&](int box_rows) {
    return device::tensor_map(p.x, true, 1, p.num_rows, p.x_stride / 2, 0, p.x_stride, box_rows);
  };
  tiles.x = x_map(kRows);
  if (plan.num_shares > 1) tiles.x_share = x_map(kRows / plan.num_shares);
  args.weight =
      device::blob_map(p.packed, ceil_div(p.n, kTileN), tile_bytes(kFormat, p.k) / kBlobBytes,
                       tile_bytes(kFormat, p.k), kHopperN / kTileN);
  tiles.row_tiles = plan.row_tiles;
  tiles.num_tiles = plan.num_tiles;
  tiles.whole_tiles = plan.whole_tiles;
  tiles.num_shares = plan.num_shares;
  tiles.per_batch = Divisor(unsigned(plan.weight_tiles * plan.row_tiles));
  tiles.per_band = Divisor(unsigned(plan.weight_tiles * kHopperBand));
  tiles.shares = Divisor(unsigned(plan.num_shares));
  tiles.per_cluster = Divisor(unsigned(plan.cluster));
  tiles.rows_of_band[0] = Divisor(kHopperBand);
  tiles.rows_of_band[1] = Divisor(unsigned(std::max(plan.row_tiles % kHopperBand, 1)));
  const auto kernel = eight_bit_kernel<kFormat, X, kRows, kGroups>;
  FASTGPT_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        Ring::kSharedBytes));
  device::launch(kernel, unsigned(plan.num_clusters * plan.cluster), kEightBitThreads,
                 Ring::kSharedBytes, stream, args, unsigned(plan.cluster));
}

/// A stage of 128 columns of codes has the bytes and the cycles of 64 columns of 16-bit values.
inline HopperPlan best_eight_bit_plan(const ProductArgs& p, int most_rows,
                                      const device::Traits& traits) {
  const int* const max_clusters = device::hopper_traits().max_clusters;
  const HopperShape shape{p.num_rows, p.n, (p.k + 1) / 2, 1, 0, 16, traits.num_sms, max_clusters};
  HopperPlan best;
  for (int rows = 64; rows <= most_rows; rows += 64) {
    for (const int cluster : {1, 2, 3, 4, 6, 8}) {
      if (max_clusters[cluster] < 1) continue;
      const HopperPlan plan = hopper_plan(shape, rows, cluster);
      if (best.rows == 0 || plan.cycles < best.cycles) best = plan;
    }
  }
  return best;
}

template <WeightFormat kFormat, class X, bool kGroups>
void launch_eight_bit(EightBitArgs& args, const device::Traits& traits, cudaStream_t stream) {
  constexpr bool kInt8 = kFormat == WeightFormat::kInt8;
  const HopperPlan plan = best_eight_bit_plan(args.tiles.product, kInt8 ? 256 : 192, traits);
  switch (plan.rows) {
    case 64:
      return launch_eight_bit_kernel<kFormat, X, 64, kGroups>(args, plan, stream);
    case 128:
      return launch_eight_bit_kernel<kFormat, X, 128, kGroups>(args, plan, stream);
    case 192:
      return launch_eight_bit_kernel<kFormat, X, 192, kGroups>(args, plan, stream);
    default:
      if constexpr (kInt8) {
        launch_eight_bit_kernel<kFormat, X, 256, kGroups>(args, plan, stream);
      }
  }
}

}  // namespace fastgpt::gemm
