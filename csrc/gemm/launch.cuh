// Choice between the two tensor-core kernels.
#pragma once
#include "gemm/decode.cuh"
#include "gemm/products.cuh"
#include "gemm/tiled.cuh"

namespace fastgpt::gemm {

/// Rows of x per weight up to which the streaming kernel is taken where tiles cannot be split over
/// CTAs, and up to which it is where they would leave SMs idle besides: its passes over x cost less
/// than an empty half of the chip.
inline constexpr std::int64_t kDecodeRowsWhole = 32;
inline constexpr std::int64_t kDecodeRowsFewTiles = 128;

template <WeightFormat kFormat, class W, class X>
void launch_product(const ProductArgs& p, int num_batches, const device::Traits& traits,
                    cudaStream_t stream) {
  const std::int64_t weights = p.sorted_rows != nullptr ? std::max(p.num_experts, 1) : 1;
  const std::int64_t rows = ceil_div(p.num_rows, weights);  // mean rows of one weight
  if (rows > kDecodeRows && ((rows <= kDecodeTileRows && keeps_x_in_l1(p)) ||
                             is_small_product(p, num_batches, traits.num_sms))) {
    return launch_decode<kFormat, W, X, 1, 4>(p, num_batches, traits.num_sms, stream);
  }
  const bool can_split = traits.arch >= 90 && p.sorted_rows == nullptr;
  const bool fills_device =
      num_row_tiles(p, 64) * ceil_div(p.n, kTiledN) * num_batches >= traits.num_sms;
  const std::int64_t decode_rows = can_split      ? kDecodeRows
                                   : fills_device ? kDecodeRowsWhole
                                                  : kDecodeRowsFewTiles;
  if (rows > decode_rows && p.x_aligned) {
    if (rows <= 32) return launch_tiled<kFormat, W, X, 32>(p, num_batches, traits, stream);
    return launch_tiled<kFormat, W, X, 64>(p, num_batches, traits, stream);
  }
  // Two weight tiles a warp halve the reads of x, if that still leaves four CTAs for every SM.
  const bool wide = ceil_div(p.n, 32) * num_batches >= 4 * traits.num_sms;
  const bool few = rows <= 8 && p.sorted_rows == nullptr;
  if (few && wide)
    return launch_decode<kFormat, W, X, 2, 1>(p, num_batches, traits.num_sms, stream);
  if (few) return launch_decode<kFormat, W, X, 1, 1>(p, num_batches, traits.num_sms, stream);
  if (wide) return launch_decode<kFormat, W, X, 2, 2>(p, num_batches, traits.num_sms, stream);
  launch_decode<kFormat, W, X, 1, 2>(p, num_batches, traits.num_sms, stream);
}

template <WeightFormat kFormat>
void launch_quantized(const ProductArgs& p, int num_batches, const device::Traits& traits,
                      cudaStream_t stream) {
  if (p.x_dtype == DType::kF16) {
    launch_product<kFormat, __half, __half>(p, num_batches, traits, stream);
  } else {
    launch_product<kFormat, __nv_bfloat16, __nv_bfloat16>(p, num_batches, traits, stream);
  }
}

}  // namespace fastgpt::gemm
