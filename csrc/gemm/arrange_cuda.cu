#include <cuda_runtime.h>

#include <algorithm>

#include "fastgpt/check.h"
#include "gemm/kernels.h"
#include "gemm/layout.cuh"

namespace fastgpt::gemm {
namespace {

constexpr int kThreads = 256;

struct ArrangeArgs {
  const std::uint8_t* weight;
  std::uint8_t* out;
  const std::uint8_t* zero_point;  // int4 asymmetric, canonical
  std::int64_t num_weights;
  std::int64_t n;
  std::int64_t k;
  std::int64_t row_bytes;  // canonical
  int group_size;          // canonical
};

// One thread writes one 4-byte word of the layout, gathering its four or eight codes; padding gets
// the code that means zero. Grid-stride over all words of all weights.
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads) arrange_kernel(const __grid_constant__ ArrangeArgs p) {
  constexpr bool kInt4 = kFormat == WeightFormat::kInt4;
  constexpr int kCols = blob_cols(kFormat);
  const std::int64_t words_per_tile = tile_bytes(kFormat, p.k) / 4;
  const std::int64_t words_per_weight = ceil_div(p.n, kTileN) * words_per_tile;
  const std::int64_t num_words = p.num_weights * words_per_weight;
  const std::int64_t groups = kInt4 ? ceil_div(p.k, p.group_size) : 1;
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < num_words;
       i += step) {
    // The inverse of packed_offset().
    const std::int64_t weight = i / words_per_weight;
    const std::int64_t in_tile = i % words_per_weight % words_per_tile;
    const int in_blob = int(in_tile % (kBlobBytes / 4));
    const int lane = in_blob % 128 / 4, word = in_blob % 4;
    const std::int64_t row =
        i % words_per_weight / words_per_tile * kTileN + in_blob / 128 * 8 + lane / 4;
    const int slot = kInt4 ? word : word / 2;
    const std::int64_t column = in_tile / (kBlobBytes / 4) * kCols + slot * kSlotCols +
                                lane % 4 * 8 + (kInt4 ? 0 : word % 2 * 4);
    const std::uint8_t* codes = p.weight + (weight * p.n + row) * p.row_bytes;
    std::uint32_t value = 0;
    if constexpr (kInt4) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const std::int64_t c = column + j;
        unsigned code = 8;
        if (row < p.n && c < p.k) {
          code = codes[c / 2] >> (c % 2 * 4) & 15U;
        } else if (row < p.n && p.zero_point != nullptr) {
          // A padded column of a group that exists, or of one behind the last: scale 0 there.
          const std::int64_t group = min(c / p.group_size, groups - 1);
          code = p.zero_point[(weight * p.n + row) * groups + group];
        }
        value |= code << (j / 2 * 4 + j % 2 * 16);
      }
    } else {
      constexpr int kByte[4] = {0, 2, 1, 3};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::int64_t c = column + j;
        const unsigned code = row < p.n && c < p.k ? codes[c] : 0U;
        value |= code << (8 * kByte[j]);
      }
    }
    reinterpret_cast<std::uint32_t*>(p.out)[i] = value;
  }
}

// One thread writes one value of [num_weights, tiles of 16 rows, groups, 16]; `padding` stands
// where the canonical [num_weights, n, groups] has nothing.
template <class T>
__global__ void __launch_bounds__(kThreads)
    arrange_groups_kernel(const T* in, T* out, T padding, std::int64_t num_weights, std::int64_t n,
                          std::int64_t k, int group_size, int out_group_size) {
  const std::int64_t groups = ceil_div(k, group_size);
  const std::int64_t out_groups = ceil_div(k, kBlockCols) * (kBlockCols / out_group_size);
  const std::int64_t per_weight = ceil_div(n, kTileN) * out_groups * kTileN;
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
       i < num_weights * per_weight; i += step) {
    const std::int64_t weight = i / per_weight, rest = i % per_weight;
    const std::int64_t row = rest / (out_groups * kTileN) * kTileN + rest % kTileN;
    const std::int64_t group = rest / kTileN % out_groups * out_group_size / group_size;
    out[i] = row < n && group < groups ? in[(weight * n + row) * groups + group] : padding;
  }
}

unsigned num_ctas(std::int64_t items) {
  return unsigned(std::clamp<std::int64_t>(ceil_div(items, kThreads), 1, 65535));
}

}  // namespace

ArrangedShape arranged_shape_cuda(WeightFormat format, std::int64_t n, std::int64_t k,
                                  int group_size) {
  ArrangedShape shape;
  if (format == WeightFormat::kDense) {
    shape.packed = {n, k};
    return shape;
  }
  const std::int64_t tiles = ceil_div(n, kTileN);
  shape.packed = {tiles, tile_bytes(format, k) / kBlobBytes, kBlobBytes};
  if (format == WeightFormat::kInt4) {
    FASTGPT_CHECK(group_size == 32 || group_size == 64 || (group_size > 0 && group_size % 128 == 0),
                  "group_size is ", group_size,
                  "; the CUDA kernels take 32, 64 or a multiple of 128, quantize the weight with "
                  "one of them");
    const std::int64_t groups =
        ceil_div(k, kBlockCols) * (kBlockCols / arranged_group_size(group_size));
    shape.scale = {tiles, groups, kTileN};
    shape.zero_point = shape.scale;
  }
  return shape;
}

void arrange_weight_cuda(const ArrangeParams& p, const Stream& stream) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  const std::int64_t num_weights = p.weight.ndim == 3 ? p.weight.size(0) : 1;
  const std::int64_t n = p.weight.size(-2);
  if (p.format == WeightFormat::kDense) {  // dense rows are streamed as they are
    FASTGPT_CUDA_TRY(cudaMemcpyAsync(p.out_packed.data, p.weight.data,
                                     std::size_t(p.weight.numel() * dtype_bytes(p.weight.dtype)),
                                     cudaMemcpyDeviceToDevice, handle));
    return;
  }
  const ArrangeArgs args{p.weight.as<std::uint8_t>(),
                         p.out_packed.as<std::uint8_t>(),
                         p.zero_point.as<std::uint8_t>(),
                         num_weights,
                         n,
                         p.k,
                         p.weight.size(-1),
                         p.group_size};
  const unsigned ctas = num_ctas(p.out_packed.numel() / 4);
  if (p.format == WeightFormat::kFp8 || p.format == WeightFormat::kInt8) {  // bytes either way
    arrange_kernel<WeightFormat::kFp8><<<ctas, kThreads, 0, handle>>>(args);
    FASTGPT_CUDA_TRY(cudaGetLastError());
    FASTGPT_CUDA_TRY(cudaMemcpyAsync(p.out_scale.data, p.scale.data,
                                     std::size_t(p.scale.numel()) * sizeof(float),
                                     cudaMemcpyDeviceToDevice, handle));
    return;
  }
  arrange_kernel<WeightFormat::kInt4><<<ctas, kThreads, 0, handle>>>(args);
  FASTGPT_CUDA_TRY(cudaGetLastError());
  const int out_group_size = arranged_group_size(p.group_size);
  arrange_groups_kernel<std::uint16_t><<<num_ctas(p.out_scale.numel()), kThreads, 0, handle>>>(
      p.scale.as<std::uint16_t>(), p.out_scale.as<std::uint16_t>(), 0, num_weights, n, p.k,
      p.group_size, out_group_size);
  FASTGPT_CUDA_TRY(cudaGetLastError());
  if (!p.zero_point) return;
  arrange_groups_kernel<std::uint8_t><<<num_ctas(p.out_zero_point.numel()), kThreads, 0, handle>>>(
      p.zero_point.as<std::uint8_t>(), p.out_zero_point.as<std::uint8_t>(), 8, num_weights, n, p.k,
      p.group_size, out_group_size);
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

}  // namespace fastgpt::gemm
