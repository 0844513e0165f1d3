// Choice between the two tensor-core kernels.
#pragma once
#include "gemm/decode.cuh"
#include "gemm/products.cuh"
#include "gemm/tiled.cuh"

namespace fastgpt::gemm {

/// Rows of x per weight up to which the streaming kernel is always taken, and up to which it is
/// where tiles would leave SMs idle: its passes over x cost less than an empty half of the chip.
inline constexpr std::int64_t kDecodeRows = 32;
inline constexpr std::int64_t kDecodeRowsFewTiles = 128;

template <WeightFormat kFormat, class W, class X>
void launch_product(const ProductArgs& p, int num_batches, const device::Traits& traits,
                    cudaStream_t stream) {
  const std::int64_t weights = p.sorted_rows != nullptr ? std::max(p.num_experts, 1) : 1;
  const std::int64_t rows = ceil_div(p.num_rows, weights);  // mean rows of one weight
  const bool fills_device =
      num_row_tiles(p, kTiledX) * ceil_div(p.n, kTiledN) * num_batches >= traits.num_sms;
  if (rows > (fills_device ? kDecodeRows : kDecodeRowsFewTiles) && p.x_aligned) {
    return launch_tiled<kFormat, W, X>(p, num_batches, stream);
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
