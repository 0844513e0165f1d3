// Launch of hopper.cuh's kernel.
#pragma once
#include "device/hopper.cuh"
#include "gemm/hopper.cuh"
#include "gemm/hopper_plan.h"

namespace fastgpt::gemm {

template <WeightFormat kFormat, class X, int kRows, Scales kScales, bool kGathered>
void launch_hopper_kernel(const ProductArgs& p, int num_batches, const HopperPlan& plan,
                          cudaStream_t stream) {
  using Ring = HopperRing<kFormat, kRows>;
  constexpr bool kFloat16 = std::is_same_v<X, __half>;
  HopperArgs args{};
  args.product = p;
  const auto x_map = [&](int box_rows) {
    return device::tensor_map(p.x, kFloat16, num_batches, p.num_rows, p.k, p.x_batch_stride * 2,
                              p.x_stride * 2, box_rows);
  };
  if (!kGathered) args.x = x_map(kRows);
  if (plan.num_shares > 1) args.x_share = x_map(kRows / plan.num_shares);
  const std::int64_t num_weights = kGathered ? p.num_experts : num_batches;
  if constexpr (kFormat == WeightFormat::kDense) {
    args.weight = device::tensor_map(p.packed, kFloat16, num_weights, p.n, p.k,
                                     p.weight_batch_bytes, p.weight_row_bytes, kHopperN);
  } else {
    const auto map = [&](const void* data, std::int64_t batch_bytes, int words, int blocks,
                         bool swizzled) {
      return device::word_map(data, num_weights, ceil_div(p.n, kTileN),
                              ceil_div(p.k, kBlockCols) * blocks, words, batch_bytes,
                              kHopperN / kTileN, blocks, swizzled);
    };
    args.weight = map(p.packed, p.weight_batch_bytes, 32, Ring::kLines, true);
    if constexpr (kFormat == WeightFormat::kInt4) {
      const int groups = kBlockCols / p.group_size;
      args.scale = map(p.scale, p.scale_batch_bytes, groups * kTileN * 2 / 4, 1, false);
      if (p.zero_point != nullptr) {
        args.zero_point = map(p.zero_point, p.zero_batch_bytes, groups * kTileN / 4, 1, false);
      }
    }
  }
  args.row_tiles = plan.row_tiles;
  args.num_tiles = plan.num_tiles;
  args.whole_tiles = plan.whole_tiles;
  args.num_shares = plan.num_shares;
  args.per_batch = Divisor(unsigned(plan.weight_tiles * plan.row_tiles));
  args.per_band = Divisor(unsigned(plan.weight_tiles * kHopperBand));
  args.shares = Divisor(unsigned(plan.num_shares));
  args.per_cluster = Divisor(unsigned(plan.cluster));
  args.rows_of_band[0] = Divisor(kHopperBand);
  args.rows_of_band[1] = Divisor(unsigned(std::max(plan.row_tiles % kHopperBand, 1)));
  const auto kernel = hopper_kernel<kFormat, X, kRows, kScales, kGathered>;
  FASTGPT_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        Ring::kSharedBytes));
  device::launch(kernel, unsigned(plan.num_clusters * plan.cluster), kHopperThreads,
                 Ring::kSharedBytes, stream, args, unsigned(plan.cluster));
}

// What is compiled is what best_hopper_plan chooses from.
template <WeightFormat kFormat, class X, Scales kScales>
void launch_hopper_scales(const ProductArgs& p, int num_batches, const HopperPlan& plan,
                          cudaStream_t stream) {
  if (p.sorted_rows != nullptr) {
    if (plan.rows == 128) {
      return launch_hopper_kernel<kFormat, X, 128, kScales, true>(p, num_batches, plan, stream);
    }
    return launch_hopper_kernel<kFormat, X, 256, kScales, true>(p, num_batches, plan, stream);
  }
  switch (plan.rows) {
    case 64:
      return launch_hopper_kernel<kFormat, X, 64, kScales, false>(p, num_batches, plan, stream);
    case 128:
      return launch_hopper_kernel<kFormat, X, 128, kScales, false>(p, num_batches, plan, stream);
    case 192:
      if constexpr (kFormat == WeightFormat::kDense) {
        return launch_hopper_kernel<kFormat, X, 192, kScales, false>(p, num_batches, plan, stream);
      }
      [[fallthrough]];
    default:
      return launch_hopper_kernel<kFormat, X, 256, kScales, false>(p, num_batches, plan, stream);
  }
}

template <WeightFormat kFormat, class X>
void launch_hopper(const ProductArgs& p, int num_batches, const device::Traits& traits,
                   cudaStream_t stream) {
  constexpr int kBits = 8 * kBlobBytes / (kTileN * blob_cols(kFormat));
  const std::int64_t num_experts = p.sorted_rows != nullptr ? std::max(p.num_experts, 1) : 0;
  const HopperPlan plan = best_hopper_plan({p.num_rows, p.n, p.k, num_batches, num_experts, kBits,
                                            traits.num_sms, device::hopper_traits().max_clusters});
  if constexpr (kFormat == WeightFormat::kDense || kFormat == WeightFormat::kInt8) {
    launch_hopper_scales<kFormat, X, Scales::kRow>(p, num_batches, plan, stream);
  } else if constexpr (kFormat == WeightFormat::kFp8) {
    if (p.block_scale) {
      launch_hopper_scales<kFormat, X, Scales::kGroup128>(p, num_batches, plan, stream);
    } else {
      launch_hopper_scales<kFormat, X, Scales::kRow>(p, num_batches, plan, stream);
    }
  } else {
    if (p.group_size == kBlockCols) {
      launch_hopper_scales<kFormat, X, Scales::kGroup128>(p, num_batches, plan, stream);
    } else {
      launch_hopper_scales<kFormat, X, Scales::kGroup32>(p, num_batches, plan, stream);
    }
  }
}

}  // namespace fastgpt::gemm
