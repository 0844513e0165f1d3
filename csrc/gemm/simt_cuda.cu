#include <algorithm>

#include "device/dependent.cuh"
#include "device/dequant.cuh"
#include "device/reduce.cuh"
#include "gemm/layout.cuh"
#include "gemm/simt.cuh"

namespace fastgpt::gemm {
namespace {

// Four columns of one weight row in float32, zero behind column k.
template <class W>
struct DenseReader {
  __device__ static void read(const ProductArgs& p, int weight, std::int64_t row,
                              std::int64_t column, float (&values)[4]) {
    const W* data = reinterpret_cast<const W*>(p.packed + weight * p.weight_batch_bytes +
                                               row * p.weight_row_bytes) +
                    column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = column + i < p.k ? device::to_float(data[i]) : 0.0F;
    }
  }
};

struct Fp8Reader {
  static constexpr WeightFormat kFormat = WeightFormat::kFp8;
  __device__ static void read(const ProductArgs& p, int weight, std::int64_t row,
                              std::int64_t column, float (&values)[4]) {
    const std::int64_t offset =
        packed_offset(kFormat, row, column, p.k) + (column % 8 >= 4 ? 4 : 0);
    const auto word =
        *reinterpret_cast<const std::uint32_t*>(p.packed + weight * p.weight_batch_bytes + offset);
    const auto* scale = reinterpret_cast<const float*>(static_cast<const char*>(p.scale) +
                                                       weight * p.scale_batch_bytes);
    const float s =
        p.block_scale ? scale[row / 128 * ceil_div(p.k, 128) + column / 128] : scale[row];
    constexpr int kByte[4] = {0, 2, 1, 3};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = device::fp8_to_float(std::uint8_t(word >> (8 * kByte[i]))) * s;
    }
  }
};

struct Int8Reader {
  static constexpr WeightFormat kFormat = WeightFormat::kInt8;
  __device__ static void read(const ProductArgs& p, int weight, std::int64_t row,
                              std::int64_t column, float (&values)[4]) {
    const std::int64_t offset =
        packed_offset(kFormat, row, column, p.k) + (column % 8 >= 4 ? 4 : 0);
    const auto word =
        *reinterpret_cast<const std::uint32_t*>(p.packed + weight * p.weight_batch_bytes + offset);
    const auto* scale = reinterpret_cast<const float*>(static_cast<const char*>(p.scale) +
                                                       weight * p.scale_batch_bytes);
    constexpr int kByte[4] = {0, 2, 1, 3};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = float(std::int8_t(word >> (8 * kByte[i]))) * scale[row];
    }
  }
};

struct Int4Reader {
  static constexpr WeightFormat kFormat = WeightFormat::kInt4;
  __device__ static void read(const ProductArgs& p, int weight, std::int64_t row,
                              std::int64_t column, float (&values)[4]) {
    const auto word = *reinterpret_cast<const std::uint32_t*>(
        p.packed + weight * p.weight_batch_bytes + packed_offset(kFormat, row, column, p.k));
    const std::int64_t index = scale_index(row, column, p.k, p.group_size);
    const auto* scale = reinterpret_cast<const __half*>(static_cast<const char*>(p.scale) +
                                                        weight * p.scale_batch_bytes);
    const float s = __half2float(scale[index]);
    const float zero =
        p.zero_point ? float(p.zero_point[weight * p.zero_batch_bytes + index]) : 8.0F;
    const int shift = column % 8 >= 4 ? 8 : 0;
    constexpr int kNibble[4] = {0, 16, 4, 20};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = (float((word >> (shift + kNibble[i])) & 15U) - zero) * s;
    }
  }
};

constexpr int kThreads = 256;
constexpr int kTile = 64;   // rows of x and of weight a CTA multiplies
constexpr int kDepth = 16;  // columns a step
constexpr int kPad = 4;     // keeps 16-byte rows and spreads banks

// One CTA owns 64 x 64 outputs, one thread 4 x 4; both operands pass through shared memory in
// float32, transposed so that a thread reads its four values at once.
// Grid: (row tiles, n / 64, heads).
template <class X, class Reader>
__global__ void __launch_bounds__(kThreads)
    simt_tile_kernel(const __grid_constant__ device::Dependent<ProductArgs> dependent) {
  __shared__ float x_tile[kDepth][kTile + kPad];
  __shared__ float w_tile[kDepth][kTile + kPad];
  const ProductArgs& p = dependent.wait();
  const RowTile tile = row_tile<kTile>(p, blockIdx.x);
  if (tile.count <= 0) return;
  const std::int64_t n0 = std::int64_t(blockIdx.y) * kTile;

  const int load_row = int(threadIdx.x) / 4;
  const int load_col = int(threadIdx.x) % 4 * 4;
  const bool x_valid = load_row < tile.count;
  const X* x = static_cast<const X*>(p.x) + (x_valid ? x_offset(p, tile, load_row) : 0);
  const std::int64_t w_row = n0 + load_row;

  const int my_row = int(threadIdx.x) / 16 * 4;
  const int my_col = int(threadIdx.x) % 16 * 4;
  float sum[4][4] = {};
  for (std::int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
    float values[4] = {};
    if (w_row < p.n && k0 + load_col < p.k) {
      Reader::read(p, tile.weight, w_row, k0 + load_col, values);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t column = k0 + load_col + i;
      w_tile[load_col + i][load_row] = values[i];
      x_tile[load_col + i][load_row] = x_valid && column < p.k ? device::to_float(x[column]) : 0.0F;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      const float4 a = *reinterpret_cast<const float4*>(&x_tile[c][my_row]);
      const float4 b = *reinterpret_cast<const float4*>(&w_tile[c][my_col]);
      const float av[4] = {a.x, a.y, a.z, a.w};
      const float bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(av[i], bv[j], sum[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (my_row + i >= tile.count) break;
    const std::int64_t row_offset = out_offset(p, tile, my_row + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (n0 + my_col + j < p.n) store_product(p, row_offset, n0 + my_col + j, sum[i][j]);
    }
  }
}

constexpr int kFewRows = 4;

// Few rows: one warp owns one weight row and up to four rows of x, lanes split the columns by
// fours. The weight is read once; x comes from L1.
// Grid: (row tiles, n / 8, heads).
template <class X, class Reader>
__global__ void __launch_bounds__(kThreads)
    simt_row_kernel(const __grid_constant__ device::Dependent<ProductArgs> dependent) {
  const ProductArgs& p = dependent.wait();
  const RowTile tile = row_tile<kFewRows>(p, blockIdx.x);
  const std::int64_t n = std::int64_t(blockIdx.y) * (kThreads / 32) + threadIdx.x / 32;
  if (tile.count <= 0 || n >= p.n) return;
  const X* rows[kFewRows];
#pragma unroll
  for (int r = 0; r < kFewRows; ++r) {
    rows[r] = static_cast<const X*>(p.x) + x_offset(p, tile, r < tile.count ? r : 0);
  }
  float sum[kFewRows] = {};
#pragma unroll 4
  for (std::int64_t column = threadIdx.x % 32 * 4; column < p.k; column += 128) {
    float values[4];
    Reader::read(p, tile.weight, n, column, values);
#pragma unroll
    for (int r = 0; r < kFewRows; ++r) {
      if (r >= tile.count) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = column + i < p.k ? device::to_float(rows[r][column + i]) : 0.0F;
        sum[r] = fmaf(x, values[i], sum[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kFewRows; ++r) {
    if (r >= tile.count) break;
    const float total = device::warp_sum(sum[r]);
    if (threadIdx.x % 32 == 0) store_product(p, out_offset(p, tile, r), n, total);
  }
}

template <class Reader>
void launch(const ProductArgs& p, int num_batches, cudaStream_t stream) {
  const std::int64_t weights = p.sorted_rows ? std::max(p.num_experts, 1) : 1;
  const bool few = p.num_rows <= 2 * kFewRows * weights;
  const int rows = few ? kFewRows : kTile;
  const int columns = few ? kThreads / 32 : kTile;
  const dim3 grid(unsigned(num_row_tiles(p, rows)), unsigned(ceil_div(p.n, columns)),
                  unsigned(num_batches));
  device::dispatch_float(p.x_dtype, [&](auto tag) {
    using X = decltype(tag);
    if (few) {
      device::launch(simt_row_kernel<X, Reader>, grid, kThreads, 0, stream, p);
    } else {
      device::launch(simt_tile_kernel<X, Reader>, grid, kThreads, 0, stream, p);
    }
  });
}

}  // namespace

void simt_product(const ProductArgs& args, WeightFormat format, int num_batches,
                  cudaStream_t stream) {
  switch (format) {
    case WeightFormat::kFp8:
      return launch<Fp8Reader>(args, num_batches, stream);
    case WeightFormat::kInt8:
      return launch<Int8Reader>(args, num_batches, stream);
    case WeightFormat::kInt4:
      return launch<Int4Reader>(args, num_batches, stream);
    case WeightFormat::kDense:
      return device::dispatch_float(args.weight_dtype, [&](auto tag) {
        launch<DenseReader<decltype(tag)>>(args, num_batches, stream);
      });
  }
}

}  // namespace fastgpt::gemm
