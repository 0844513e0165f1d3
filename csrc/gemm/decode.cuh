// Products for few rows of x: the weight streams through once, everything else is small.
//
// One CTA owns 16 (or 32) weight rows and up to 8 (16, 32) rows of x. Its warps split the columns:
// warp w takes the blocks w, w + num_warps, ... and keeps a private ring of blocks in flight, so no
// barrier stands between a load and the next; partial sums meet once in shared memory. x is read
// straight into the operands, past shared memory: each value is used by one warp of the CTA only,
// and L1 holds it for the CTAs that follow on the same SM.
//
//   weight rows       columns ─►   block 0   block 1   block 2   block 3   block 4 ...
//   16 of this CTA                 warp 0    warp 1    warp 2    warp 0    warp 1
//
// The rings fill before the kernel waits for its predecessor, so the first round of memory latency
// passes while that one still runs. Experts wait first: the routing chooses their weights.
//
// Grid: (row tiles, weight tiles, heads). Row tiles run fastest, so CTAs that share a weight tile
// run together and the second reads it from L2.
#pragma once
#include <algorithm>

#include "device/dependent.cuh"
#include "device/ptx.cuh"
#include "gemm/arguments.cuh"
#include "gemm/fragments.cuh"

namespace fastgpt::gemm {

inline constexpr int kDecodeMaxWarps = 12;

/// Warps that an SM has registers and rings for.
template <int kTilesX>
inline constexpr int kDecodeResidentWarps = kTilesX == 1   ? 24
                                            : kTilesX == 2 ? 16
                                                           : 12;

/// One block of a warp's ring. Six to eight KiB a warp in flight whatever the format, so that 24
/// warps of an SM ask for 150 to 190 KiB: six times what the latency of memory needs, because CTAs
/// start empty.
template <WeightFormat kFormat, int kTilesN>
struct DecodeStage {
  static constexpr int kCols = kFormat == WeightFormat::kDense ? 64 : 128;
  static constexpr int kBytes = kCols / blob_cols(kFormat) * kBlobBytes;  // a 16-row tile
  static constexpr int kCount = (kFormat == WeightFormat::kInt4 ? 6 : 4) / kTilesN;
  static constexpr int kScaleBytes = kFormat == WeightFormat::kInt4 ? 128 : 0;  // groups of 32
  static constexpr int kZeroBytes = kFormat == WeightFormat::kInt4 ? 64 : 0;
  static constexpr int kTileBytes = kBytes + kScaleBytes + kZeroBytes;
  static constexpr int kTotalBytes = kTilesN * kTileBytes;
};

/// Bytes of shared memory, for a ring no longer than a warp's number of blocks.
template <WeightFormat kFormat, int kTilesN, int kTilesX>
int decode_shared_bytes(std::int64_t k, int num_warps) {
  using Stage = DecodeStage<kFormat, kTilesN>;
  const std::int64_t blocks = ceil_div(ceil_div(k, Stage::kCols), num_warps);
  const int ring = int(std::min<std::int64_t>(blocks, Stage::kCount)) * Stage::kTotalBytes;
  const int sums = 8 * kTilesX * (16 * kTilesN + 4) * int(sizeof(float));
  return num_warps * std::max(ring, sums);
}

// kPlain: int4 with one group a block and no zero points, whose branches would stand between the
// instructions that hide each other's latency.
template <WeightFormat kFormat, class W, class X, int kTilesN, int kTilesX, bool kPlain>
__global__ void __launch_bounds__(32 * kDecodeMaxWarps)
    decode_kernel(const __grid_constant__ device::Dependent<ProductArgs> dependent) {
#if __CUDA_ARCH__ >= 800
  using Stage = DecodeStage<kFormat, kTilesN>;
  constexpr bool kMixed = !std::is_same_v<W, X>;
  constexpr bool kInt4 = kFormat == WeightFormat::kInt4;
  constexpr int kSlots = Stage::kCols / kSlotCols;
  constexpr int kPieces = Stage::kBytes / 512;  // 16-byte pieces a lane copies of one tile
  static_assert(kDecodeMaxWarps * Stage::kCount * Stage::kTotalBytes <= 99 * 1024);
  constexpr int kPitch = 16 * kTilesN + 4;  // floats between rows of x in the partial sums
  extern __shared__ __align__(16) std::uint8_t shared[];

  const ProductArgs& p = dependent.constants();
  if (p.sorted_rows != nullptr) dependent.wait();  // the routing chooses the weight
  const RowTile tile = row_tile<8 * kTilesX>(p, blockIdx.x);
  if (tile.count <= 0) return;  // grouped only, and has waited
  const int lane = int(threadIdx.x % 32);
  const int warp = int(threadIdx.x / 32);
  const int num_warps = int(blockDim.x / 32);
  const int g = lane / 4, t = lane % 4;
  const std::int64_t n0 = std::int64_t(blockIdx.y) * (16 * kTilesN);
  const int k = int(p.k);
  const int num_blocks = (k + Stage::kCols - 1) / Stage::kCols;
  const int mine = num_blocks > warp ? (num_blocks - warp + num_warps - 1) / num_warps : 0;
  const int ring = min((num_blocks + num_warps - 1) / num_warps, Stage::kCount);
  std::uint8_t* const stages = shared + warp * ring * Stage::kTotalBytes;
  std::uint8_t* const stages_end = stages + ring * Stage::kTotalBytes;

  const auto* scale = static_cast<const std::uint8_t*>(p.scale) + tile.weight * p.scale_batch_bytes;
  const bool has_zero = kInt4 && !kPlain && p.zero_point != nullptr;
  const int groups = kInt4 && !kPlain ? kBlockCols / p.group_size : 1;  // of one block

  // Where this lane's next pieces come from; the pointers advance by a fixed step, because at one
  // row a weight may cost four instructions in all. Tiles behind the last row read the first tile
  // again; nobody stores what they add up to.
  const std::uint8_t* packed = p.packed + tile.weight * p.weight_batch_bytes;
  const std::uint8_t* row_source[kTilesN][2];  // dense
  const std::uint8_t* scale_source = scale;
  const std::uint8_t* zero_source = p.zero_point + tile.weight * p.zero_batch_bytes;
  std::int64_t tile_step = 0;  // blocks to the second tile
  int fetch_column = warp * Stage::kCols + t * 8;
  if constexpr (kFormat == WeightFormat::kDense) {
#pragma unroll
    for (int i = 0; i < 2 * kTilesN; ++i) {
      const std::int64_t row = min(n0 + i * 8 + g, p.n - 1);
      row_source[i / 2][i % 2] = packed + row * p.weight_row_bytes;
    }
  } else {
    const std::int64_t k_blocks = ceil_div(p.k, kBlockCols);
    const std::int64_t index = n0 / 16 * k_blocks + warp;
    packed += index * Stage::kBytes + lane * 16;
    scale_source += (index * groups * 2 + lane) * 16;
    zero_source += (index * groups + lane) * 16;
    if (n0 + 16 < p.n) tile_step = k_blocks;
  }
  const auto fetch = [&](std::uint8_t* stage) {
#pragma unroll
    for (int tn = 0; tn < kTilesN; ++tn, stage += Stage::kTileBytes) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        std::uint8_t* to = stage + piece * 512 + lane * 16;
        if constexpr (kFormat == WeightFormat::kDense) {
          const int column = fetch_column + piece / 2 * kSlotCols;
          device::copy_async_16(to, row_source[tn][piece % 2] + (column < k ? column * 2LL : 0),
                                column < k ? 16 : 0);
        } else {
          device::copy_async_16(to, packed + tn * tile_step * Stage::kBytes + piece * 512, 16);
        }
      }
      if constexpr (kInt4) {
        if (lane < 2 * groups) {
          device::copy_async_16(stage + Stage::kBytes + lane * 16,
                                scale_source + tn * tile_step * groups * 32, 16);
        }
        if (has_zero && lane < groups) {
          device::copy_async_16(stage + Stage::kBytes + Stage::kScaleBytes + lane * 16,
                                zero_source + tn * tile_step * groups * 16, 16);
        }
      }
    }
    packed += num_warps * Stage::kBytes;
    scale_source += num_warps * groups * 32;
    zero_source += num_warps * groups * 16;
    fetch_column += num_warps * Stage::kCols;
  };
#pragma unroll
  for (int i = 0; i < Stage::kCount; ++i) {
    if (i < min(mine, ring)) fetch(stages + i * Stage::kTotalBytes);
    device::copy_async_commit();
  }
  dependent.wait();  // the weights are on their way; x may still be written

  const X* rows[kTilesX];
  bool live[kTilesX];
#pragma unroll
  for (int tx = 0; tx < kTilesX; ++tx) {
    live[tx] = tx * 8 + g < tile.count;
    rows[tx] = static_cast<const X*>(p.x) + x_offset(p, tile, live[tx] ? tx * 8 + g : 0);
  }

  float sum[kTilesN][kTilesX][4] = {};
  uint4 x[kTilesX][kSlots] = {};  // stays zero in lanes without a row
  SlotZero<kFormat, X> slot_zero(8, 8);
  std::uint8_t* stage = stages;
  int column = warp * Stage::kCols;
  for (int i = 0; i < mine; ++i) {
    const bool whole = p.x_aligned && column + Stage::kCols <= k;
#pragma unroll
    for (int tx = 0; tx < kTilesX; ++tx) {
      if (!live[tx]) continue;
      const X* from = rows[tx] + column + t * 8;
      if (whole) {
#pragma unroll
        for (int a = 0; a < kSlots; ++a) x[tx][a] = device::load_16(from + a * kSlotCols);
      } else {
#pragma unroll
        for (int a = 0; a < kSlots; ++a) {
          x[tx][a] = device::load_8(rows[tx], column + a * kSlotCols + t * 8, p.k, p.x_aligned);
        }
      }
    }
    float block_scale = 1.0F;
    if constexpr (kFormat == WeightFormat::kFp8) {
      if (p.block_scale) {
        block_scale = reinterpret_cast<const float*>(
            scale)[n0 / 128 * ceil_div(p.k, kBlockCols) + column / kBlockCols];
      }
    }
    device::copy_async_wait<Stage::kCount - 1>();
    __syncwarp();  // scales were copied by other lanes
#pragma unroll
    for (int tn = 0; tn < kTilesN; ++tn) {
      const std::uint8_t* tile_stage = stage + tn * Stage::kTileBytes;
      uint4 pieces[kPieces];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        pieces[piece] = *reinterpret_cast<const uint4*>(tile_stage + piece * 512 + lane * 16);
      }
      if constexpr (kFormat == WeightFormat::kDense) {
#pragma unroll
        for (int a = 0; a < kSlots; ++a) {
          const auto slot = slot_of<kFormat>(pieces, a);
          if constexpr (kMixed) {
#pragma unroll
            for (int tx = 0; tx < kTilesX; ++tx) {
              multiply_slot_mixed<W, X>(sum[tn][tx], slot, x[tx][a]);
            }
          } else {
            std::uint32_t operands[2][4];
            slot_operands<kFormat, X>(slot, slot_zero, operands);
#pragma unroll
            for (int tx = 0; tx < kTilesX; ++tx) {
              multiply_slot<X>(sum[tn][tx], operands, x[tx][a]);
            }
          }
        }
      } else {
        float partial[kTilesX][4] = {};
        const auto* scales = reinterpret_cast<const __half*>(tile_stage + Stage::kBytes);
        const std::uint8_t* zeros = tile_stage + Stage::kBytes + Stage::kScaleBytes;
#pragma unroll
        for (int a = 0; a < kSlots; ++a) {
          const int group = kInt4 ? a * groups / kSlots : 0;
          if (has_zero) {
            slot_zero = SlotZero<kFormat, X>(zeros[group * 16 + g], zeros[group * 16 + g + 8]);
          }
          std::uint32_t operands[2][4];
          slot_operands<kFormat, X>(slot_of<kFormat>(pieces, a), slot_zero, operands);
#pragma unroll
          for (int tx = 0; tx < kTilesX; ++tx) multiply_slot<X>(partial[tx], operands, x[tx][a]);
          // The group ends here: its products were exact, its scale meets them in float32.
          if (a == kSlots - 1 || (kInt4 && group != (a + 1) * groups / kSlots)) {
            const float s0 = kInt4 ? __half2float(scales[group * 16 + g]) : block_scale;
            const float s1 = kInt4 ? __half2float(scales[group * 16 + g + 8]) : block_scale;
#pragma unroll
            for (int tx = 0; tx < kTilesX; ++tx) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                sum[tn][tx][j] = fmaf(partial[tx][j], j < 2 ? s0 : s1, sum[tn][tx][j]);
                partial[tx][j] = 0.0F;
              }
            }
          }
        }
      }
    }
    __syncwarp();  // every lane has read the stage
    if (i + ring < mine) fetch(stage);
    device::copy_async_commit();
    stage += Stage::kTotalBytes;
    if (stage == stages_end) stage = stages;
    column += num_warps * Stage::kCols;
  }

  // Partial sums [warp][row of x][weight row]; they take the place of the rings.
  device::copy_async_wait<0>();
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int tn = 0; tn < kTilesN; ++tn) {
#pragma unroll
    for (int tx = 0; tx < kTilesX; ++tx) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = tx * 8 + t * 2 + j % 2;
        sums[(warp * 8 * kTilesX + row) * kPitch + tn * 16 + j / 2 * 8 + g] = sum[tn][tx][j];
      }
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < tile.count * 16 * kTilesN; i += int(blockDim.x)) {
    const int row = i / (16 * kTilesN), column = i % (16 * kTilesN);
    if (n0 + column >= p.n) continue;
    float total = 0.0F;
    for (int w = 0; w < num_warps; ++w) total += sums[(w * 8 * kTilesX + row) * kPitch + column];
    if constexpr (kHasChannelScale<kFormat>) {
      total *= kCodeUnit<kFormat, X>;
      if (!p.block_scale) total *= reinterpret_cast<const float*>(scale)[n0 + column];
    }
    store_product(p, out_offset(p, tile, row), n0 + column, total);
  }
#endif
}

/// Warps of a CTA. CTAs that start together end together, so what counts is how rounds of them fill
/// the SMs: a round lasts as long as its SM's blocks, or as its longest warp's, and a set-up. The
/// constants are in times of a block and fit an H100's.
/// @param max_warps resident on an SM, by registers and rings.
inline int decode_num_warps(std::int64_t num_ctas, std::int64_t num_blocks, int num_sms,
                            int max_warps) {
  constexpr std::int64_t kSetup = 20;
  constexpr std::int64_t kLatency = 10;  // of a block in a warp
  constexpr double kFewWarps = 2;        // of an SM hide each other's latency less
  const std::int64_t of_sm = ceil_div(num_ctas, num_sms);
  int best = 1;
  double best_cost = 0;
  for (int w = 1; w <= kDecodeMaxWarps && w <= std::max<std::int64_t>(num_blocks, 1); ++w) {
    const std::int64_t resident = std::clamp<std::int64_t>(max_warps / w, 1, of_sm);
    const std::int64_t longest_warp = kLatency * ceil_div(num_blocks, w);
    const std::int64_t full_rounds = of_sm / resident, left = of_sm % resident;
    const std::int64_t cost =
        full_rounds * (kSetup + std::max(resident * num_blocks, longest_warp)) +
        (left > 0 ? kSetup + std::max(left * num_blocks, longest_warp) : 0);
    const double weighted = double(cost) * (1.0 + kFewWarps / double(resident * w));
    if (w == 1 || weighted <= best_cost) {
      best = w;
      best_cost = weighted;
    }
  }
  return best;
}

template <WeightFormat kFormat, class W, class X, int kTilesN, int kTilesX>
void launch_decode(const ProductArgs& p, int num_batches, int num_sms, cudaStream_t stream) {
  constexpr bool kInt4 = kFormat == WeightFormat::kInt4;
  const bool plain = kInt4 && p.group_size == kBlockCols && p.zero_point == nullptr;
  const auto kernel = plain ? decode_kernel<kFormat, W, X, kTilesN, kTilesX, kInt4>
                            : decode_kernel<kFormat, W, X, kTilesN, kTilesX, false>;
  const dim3 grid(unsigned(num_row_tiles(p, 8 * kTilesX)), unsigned(ceil_div(p.n, 16 * kTilesN)),
                  unsigned(num_batches));
  const int warps = decode_num_warps(std::int64_t(grid.x) * grid.y * grid.z,
                                     ceil_div(p.k, DecodeStage<kFormat, kTilesN>::kCols), num_sms,
                                     kDecodeResidentWarps<kTilesX>);
  const int shared_bytes = decode_shared_bytes<kFormat, kTilesN, kTilesX>(p.k, warps);
  FASTGPT_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  device::launch(kernel, grid, unsigned(32 * warps), std::size_t(shared_bytes), stream, p);
}

}  // namespace fastgpt::gemm
