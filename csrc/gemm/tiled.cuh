// Products for many rows of x: tiles of both operands pass through shared memory.
//
// One CTA owns 128 weight rows and 64 rows of x; eight warps own 32 x 32 outputs each, four along
// the weight and two along x:
//
//        x rows ─►   0..31    32..63
//     weight 0..31   warp 0   warp 4
//           32..63   warp 1   warp 5      a stage: 128 columns (dense: 64) of both operands
//           64..95   warp 2   warp 6
//          96..127   warp 3   warp 7
//
// Weights stay packed until they are operands; codes enter the products as exact small numbers and
// a group's scale meets its partial sums in float32.
// Grid: (row tiles, weight tiles, heads), row tiles fastest: a weight tile is read from memory
// once.
#pragma once
#include "device/dependent.cuh"
#include "device/ptx.cuh"
#include "gemm/arguments.cuh"
#include "gemm/fragments.cuh"

namespace fastgpt::gemm {

inline constexpr int kTiledThreads = 256;
inline constexpr int kTiledN = 128;
inline constexpr int kTiledX = 64;

template <WeightFormat kFormat>
struct TiledStage {
  static constexpr int kCols = kFormat == WeightFormat::kDense ? 64 : 128;
  static constexpr int kTileBytes = kCols / blob_cols(kFormat) * kBlobBytes;  // 16 weight rows
  static constexpr int kWeightBytes = kTiledN / kTileN * kTileBytes;
  static constexpr int kScaleBytes = kFormat == WeightFormat::kInt4 ? kTiledN * 4 * 2 : 0;
  static constexpr int kZeroBytes = kFormat == WeightFormat::kInt4 ? kTiledN * 4 : 0;
  static constexpr int kXBytes = kTiledX * kCols * 2;
  static constexpr int kTotalBytes = kWeightBytes + kScaleBytes + kZeroBytes + kXBytes;
  static constexpr int kCount = kFormat == WeightFormat::kDense ? 4 : 3;
};

/// Floats between rows of x in the shared output tile: four more than the tile spreads the banks.
inline constexpr int kTiledOutPitch = kTiledN + 4;

template <WeightFormat kFormat>
constexpr int tiled_shared_bytes() {
  const int ring = TiledStage<kFormat>::kCount * TiledStage<kFormat>::kTotalBytes;
  const int out = kTiledX * kTiledOutPitch * int(sizeof(float));
  return ring > out ? ring : out;
}

/// Position of the 16-byte chunk of a row of x. Eight lanes read four chunks of two neighbouring
/// rows at once; the rows take different halves of the banks.
__device__ inline int x_chunk(int row, int chunk, int chunks_per_row) {
  return (row * chunks_per_row + (chunk ^ (row % 2 * 4))) * 16;
}

template <WeightFormat kFormat, class W, class X>
__global__ void __launch_bounds__(kTiledThreads, 2)
    tiled_kernel(const __grid_constant__ device::Dependent<ProductArgs> dependent) {
#if __CUDA_ARCH__ >= 800
  using Stage = TiledStage<kFormat>;
  constexpr bool kMixed = !std::is_same_v<W, X>;
  constexpr bool kInt4 = kFormat == WeightFormat::kInt4;
  constexpr int kSlots = Stage::kCols / kSlotCols;
  constexpr int kChunks = Stage::kCols / 8;  // of a row of x
  static_assert(tiled_shared_bytes<kFormat>() <= 99 * 1024 - 1024);
  extern __shared__ __align__(16) std::uint8_t shared[];
  __shared__ std::int64_t x_offsets[kTiledX];

  const ProductArgs& p = dependent.wait();
  const RowTile tile = row_tile<kTiledX>(p, blockIdx.x);
  if (tile.count <= 0) return;
  const int thread = int(threadIdx.x);
  const int lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_n = thread / 32 % 4, warp_x = thread / 32 / 4;
  const std::int64_t n0 = std::int64_t(blockIdx.y) * kTiledN;
  const int num_blocks = int((p.k + Stage::kCols - 1) / Stage::kCols);

  const std::uint8_t* packed = p.packed + tile.weight * p.weight_batch_bytes;
  const auto* scale = static_cast<const std::uint8_t*>(p.scale) + tile.weight * p.scale_batch_bytes;
  const std::uint8_t* zero =
      p.zero_point ? p.zero_point + tile.weight * p.zero_batch_bytes : nullptr;
  const int groups = kInt4 ? kBlockCols / p.group_size : 1;  // of one block

  if (thread < kTiledX) x_offsets[thread] = thread < tile.count ? x_offset(p, tile, thread) : -1;
  __syncthreads();

  // Ask for block `block` of both operands.
  const auto fetch = [&](int block) {
    std::uint8_t* stage = shared + block % Stage::kCount * Stage::kTotalBytes;
    if constexpr (kFormat == WeightFormat::kDense) {
#pragma unroll
      for (int i = 0; i < Stage::kWeightBytes / 16 / kTiledThreads; ++i) {
        const int chunk = i * kTiledThreads + thread;  // [tile of 16][slot][half][lane]
        const int piece = chunk / 32 % (2 * kSlots);
        const std::int64_t row = n0 + chunk / 32 / (2 * kSlots) * 16 + piece % 2 * 8 + g;
        const std::int64_t column =
            std::int64_t(block) * Stage::kCols + piece / 2 * kSlotCols + t * 8;
        const bool valid = row < p.n && column < p.k;
        device::copy_async_16(stage + chunk * 16,
                              packed + (valid ? row * p.weight_row_bytes + column * 2 : 0),
                              valid ? 16 : 0);
      }
    } else {
      const std::int64_t k_blocks = ceil_div(p.k, kBlockCols);
#pragma unroll
      for (int i = 0; i < Stage::kWeightBytes / 16 / kTiledThreads; ++i) {
        const int chunk = i * kTiledThreads + thread;
        const std::int64_t tile_n = n0 / 16 + chunk * 16 / Stage::kTileBytes;
        const bool valid = tile_n * 16 < p.n;
        const std::int64_t offset =
            (tile_n * k_blocks + block) * Stage::kTileBytes + chunk * 16 % Stage::kTileBytes;
        device::copy_async_16(stage + chunk * 16, packed + (valid ? offset : 0), valid ? 16 : 0);
      }
      if constexpr (kInt4) {
        // Scales [tile of 16][group][16], the tiles apart in memory and together here.
        const int scale_chunks = 2 * groups;
        if (thread < kTiledN / 16 * scale_chunks) {
          const std::int64_t tile_n = n0 / 16 + thread / scale_chunks;
          const bool valid = tile_n * 16 < p.n;
          const std::int64_t offset =
              ((tile_n * k_blocks + block) * scale_chunks + thread % scale_chunks) * 16;
          device::copy_async_16(stage + Stage::kWeightBytes + thread * 16,
                                scale + (valid ? offset : 0), valid ? 16 : 0);
        }
        if (zero != nullptr && thread < kTiledN / 16 * groups) {
          const std::int64_t tile_n = n0 / 16 + thread / groups;
          const bool valid = tile_n * 16 < p.n;
          const std::int64_t offset = ((tile_n * k_blocks + block) * groups + thread % groups) * 16;
          device::copy_async_16(stage + Stage::kWeightBytes + Stage::kScaleBytes + thread * 16,
                                zero + (valid ? offset : 0), valid ? 16 : 0);
        }
      }
    }
    std::uint8_t* x_stage = stage + Stage::kTotalBytes - Stage::kXBytes;
#pragma unroll
    for (int i = 0; i < kTiledX * kChunks / kTiledThreads; ++i) {
      const int chunk = i * kTiledThreads + thread;
      const int row = chunk / kChunks;
      const std::int64_t column = std::int64_t(block) * Stage::kCols + chunk % kChunks * 8;
      const std::int64_t offset = x_offsets[row];
      const bool valid = offset >= 0 && column < p.k;
      const std::int64_t bytes = (p.k - column) * 2;
      device::copy_async_16(x_stage + x_chunk(row, chunk % kChunks, kChunks),
                            static_cast<const X*>(p.x) + (valid ? offset + column : 0),
                            valid ? int(bytes < 16 ? bytes : 16) : 0);
    }
  };
#pragma unroll
  for (int i = 0; i < Stage::kCount - 1; ++i) {
    if (i < num_blocks) fetch(i);
    device::copy_async_commit();
  }

  float sum[2][4][4] = {};
  SlotZero<kFormat, X> slot_zero[2] = {{8, 8}, {8, 8}};
  for (int block = 0; block < num_blocks; ++block) {
    float block_scale = 1.0F;
    if constexpr (kFormat == WeightFormat::kFp8) {
      if (p.block_scale) {
        block_scale =
            reinterpret_cast<const float*>(scale)[n0 / 128 * ceil_div(p.k, kBlockCols) + block];
      }
    }
    device::copy_async_wait<Stage::kCount - 2>();
    __syncthreads();  // this stage has arrived for all, and all have left the one fetched next
    if (block + Stage::kCount - 1 < num_blocks) fetch(block + Stage::kCount - 1);
    device::copy_async_commit();

    const std::uint8_t* stage = shared + block % Stage::kCount * Stage::kTotalBytes;
    const std::uint8_t* x_stage = stage + Stage::kTotalBytes - Stage::kXBytes;
    float partial[2][4][4] = {};
#pragma unroll
    for (int a = 0; a < kSlots; ++a) {
      uint4 x[4];
#pragma unroll
      for (int tx = 0; tx < 4; ++tx) {
        x[tx] = *reinterpret_cast<const uint4*>(
            x_stage + x_chunk(warp_x * 32 + tx * 8 + g, a * 4 + t, kChunks));
      }
      const int group = kInt4 ? a * groups / kSlots : 0;
#pragma unroll
      for (int tn = 0; tn < 2; ++tn) {
        const int tile_n = warp_n * 2 + tn;  // of the CTA
        const auto slot = read_slot<kFormat>(stage + tile_n * Stage::kTileBytes, a, lane);
        if constexpr (kMixed) {
#pragma unroll
          for (int tx = 0; tx < 4; ++tx) multiply_slot_mixed<W, X>(sum[tn][tx], slot, x[tx]);
        } else {
          const int first = (tile_n * groups + group) * 16 + g;  // of this lane's scales
          if (kInt4 && zero != nullptr) {
            const std::uint8_t* zeros = stage + Stage::kWeightBytes + Stage::kScaleBytes;
            slot_zero[tn] = SlotZero<kFormat, X>(zeros[first], zeros[first + 8]);
          }
          std::uint32_t operands[2][4];
          slot_operands<kFormat, X>(slot, slot_zero[tn], operands);
#pragma unroll
          for (int tx = 0; tx < 4; ++tx) {
            if constexpr (kFormat == WeightFormat::kDense) {
              multiply_slot<X>(sum[tn][tx], operands, x[tx]);
            } else {
              multiply_slot<X>(partial[tn][tx], operands, x[tx]);
            }
          }
          if (kFormat != WeightFormat::kDense &&
              (a == kSlots - 1 || (kInt4 && group != (a + 1) * groups / kSlots))) {
            const auto* scales = reinterpret_cast<const __half*>(stage + Stage::kWeightBytes);
            const float s0 = kInt4 ? __half2float(scales[first]) : block_scale;
            const float s1 = kInt4 ? __half2float(scales[first + 8]) : block_scale;
#pragma unroll
            for (int tx = 0; tx < 4; ++tx) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                sum[tn][tx][j] = fmaf(partial[tn][tx][j], j < 2 ? s0 : s1, sum[tn][tx][j]);
                partial[tn][tx][j] = 0.0F;
              }
            }
          }
        }
      }
    }
  }

  // Through shared memory, so that rows of out are written in whole lines.
  device::copy_async_wait<0>();
  __syncthreads();
  auto* out_tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int tn = 0; tn < 2; ++tn) {
#pragma unroll
    for (int tx = 0; tx < 4; ++tx) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = warp_x * 32 + tx * 8 + t * 2 + j % 2;
        const int column = warp_n * 32 + tn * 16 + j / 2 * 8 + g;
        out_tile[row * kTiledOutPitch + column] = sum[tn][tx][j];
      }
    }
  }
  __syncthreads();
  const std::int64_t n = n0 + thread % kTiledN;
  if (n >= p.n) return;
  float unit = 1.0F;
  if constexpr (kHasChannelScale<kFormat>) {
    unit = kCodeUnit<kFormat, X>;
    if (!p.block_scale) unit *= reinterpret_cast<const float*>(scale)[n];
  }
  for (int row = thread / kTiledN; row < tile.count; row += kTiledThreads / kTiledN) {
    const float value = out_tile[row * kTiledOutPitch + thread % kTiledN] * unit;
    store_product(p, out_offset(p, tile, row), n, value);
  }
#endif
}

template <WeightFormat kFormat, class W, class X>
void launch_tiled(const ProductArgs& p, int num_batches, cudaStream_t stream) {
  const auto kernel = tiled_kernel<kFormat, W, X>;
  constexpr int kBytes = tiled_shared_bytes<kFormat>();
  FASTGPT_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const dim3 grid(unsigned(num_row_tiles(p, kTiledX)), unsigned(ceil_div(p.n, kTiledN)),
                  unsigned(num_batches));
  device::launch(kernel, grid, kTiledThreads, kBytes, stream, p);
}

}  // namespace fastgpt::gemm
