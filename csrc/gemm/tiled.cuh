// Products for more rows of x than decode.cuh streams: tiles of both operands pass through shared
// memory.
//
// One CTA owns 128 weight rows and kX rows of x (16, 32 or 64); eight warps own 32 weight rows
// each, four along the weight and two along x (64 rows) or along the columns of a stage (fewer):
//
//        x rows ─►   0..31    32..63                  x rows ─►   0..kX - 1   0..kX - 1
//     weight 0..31   warp 0   warp 4      or       weight 0..31   warp 0      warp 4
//           32..63   warp 1   warp 5                     ...        ... first and second half
//           64..95   warp 2   warp 6                                        of the columns
//          96..127   warp 3   warp 7
//
// A stage is 128 columns (dense: 64) of both operands. Weights stay packed until they are operands;
// codes enter the products as exact small numbers and a group's scale meets its partial sums in
// float32.
//
// Where tiles are too few for the device, the CTAs of a cluster share a tile: each multiplies a
// part of the columns, then adds up every size-th row, whose parts the others store into its shared
// memory. The barrier that counts them in orders them too: no fence, and no workspace.
//
// The rings of weights fill before the kernel waits for its predecessor. Experts wait first: the
// routing chooses their weights.
// Grid: (row tiles * cluster, weight tiles, heads), row tiles fastest: a weight tile is read from
// memory once.
#pragma once
#include <algorithm>

#include "device/cluster.cuh"
#include "device/dependent.cuh"
#include "device/hopper.cuh"
#include "device/ptx.cuh"
#include "gemm/arguments.cuh"
#include "gemm/fragments.cuh"

namespace fastgpt::gemm {

inline constexpr int kTiledThreads = 256;
inline constexpr int kTiledN = 128;
inline constexpr int kMaxSplits = 8;  // CTAs of a portable cluster

template <WeightFormat kFormat, int kX>
struct TiledStage {
  static constexpr int kCols = kFormat == WeightFormat::kDense ? 64 : 128;
  static constexpr int kTileBytes = kCols / blob_cols(kFormat) * kBlobBytes;  // 16 weight rows
  static constexpr int kWeightBytes = kTiledN / kTileN * kTileBytes;
  static constexpr int kScaleBytes = kFormat == WeightFormat::kInt4 ? kTiledN * 4 * 2 : 0;
  static constexpr int kZeroBytes = kFormat == WeightFormat::kInt4 ? kTiledN * 4 : 0;
  static constexpr int kXBytes = kX * kCols * 2;
  static constexpr int kTotalBytes = kWeightBytes + kScaleBytes + kZeroBytes + kXBytes;
  static constexpr int kCount = kFormat == WeightFormat::kDense || kX <= 32 ? 4 : 3;
};

/// What a warp owns of the tile and of a stage.
template <WeightFormat kFormat, int kX>
struct TiledWarp {
  static constexpr bool kSplitsColumns = kX < 64;
  static constexpr int kRows = kSplitsColumns ? kX : kX / 2;  // of x
  static constexpr int kSlots =
      TiledStage<kFormat, kX>::kCols / kSlotCols / (kSplitsColumns ? 2 : 1);
  static constexpr int kParts = kSplitsColumns ? 2 : 1;  // of a sum within the CTA
};

/// Floats between rows of x in the shared output tile: four more than the tile spreads the banks.
inline constexpr int kTiledOutPitch = kTiledN + 4;

/// The output tile, and behind it what other CTAs of the cluster store; they take the ring's place.
template <WeightFormat kFormat, int kX>
struct TiledShared {
  static constexpr int kOutBytes =
      TiledWarp<kFormat, kX>::kParts * kX * kTiledOutPitch * int(sizeof(float));
  static constexpr int kReceiveBytes = (kX + kMaxSplits - 1) * kTiledN * int(sizeof(float));
  static constexpr int kRingBytes =
      TiledStage<kFormat, kX>::kCount * TiledStage<kFormat, kX>::kTotalBytes;
  static constexpr int kBytes = std::max(kRingBytes, kOutBytes + kReceiveBytes);
  static_assert(kBytes <= 99 * 1024 - 1024, "sm_80 has 99 KiB for a CTA with its static memory");
};

/// Position of the 16-byte chunk of a row of x. Eight lanes read four chunks of two neighbouring
/// rows at once; the rows take different halves of the banks.
__device__ inline int x_chunk(int row, int chunk, int chunks_per_row) {
  return (row * chunks_per_row + (chunk ^ (row % 2 * 4))) * 16;
}

template <WeightFormat kFormat, class W, class X, int kX>
__global__ void __launch_bounds__(kTiledThreads, 2)
    tiled_kernel(const __grid_constant__ device::Dependent<ProductArgs> dependent) {
#if __CUDA_ARCH__ >= 800
  using Stage = TiledStage<kFormat, kX>;
  using Warp = TiledWarp<kFormat, kX>;
  constexpr bool kMixed = !std::is_same_v<W, X>;
  constexpr bool kInt4 = kFormat == WeightFormat::kInt4;
  constexpr int kSlots = Stage::kCols / kSlotCols;
  constexpr int kChunks = Stage::kCols / 8;                          // of a row of x
  constexpr int kXTiles = Warp::kRows / 8;                           // of a warp
  constexpr int kPieces = Stage::kWeightBytes / 16 / kTiledThreads;  // a thread copies of a stage
  constexpr int kXPieces = kX * kChunks / kTiledThreads;
  static_assert(kXPieces * kTiledThreads == kX * kChunks || kX * kChunks < kTiledThreads);
  constexpr int kXCopies = kXPieces > 0 ? kXPieces : 1;
  extern __shared__ __align__(16) std::uint8_t shared[];
  __shared__ std::uint64_t parts_arrived;

  const ProductArgs& p = dependent.constants();
  if (p.sorted_rows != nullptr) dependent.wait();  // the routing chooses the weight
  const int splits = int(device::cluster_size());
  const int rank = int(device::cluster_rank());
  const RowTile tile = row_tile<kX>(p, blockIdx.x / unsigned(splits));
  if (tile.count <= 0) return;  // grouped only, has waited, and so does the whole cluster
  const int thread = int(threadIdx.x);
  const int lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int warp_n = thread / 32 % 4, half = thread / 32 / 4;
  const int first_row = Warp::kSplitsColumns ? 0 : half * Warp::kRows;
  const int first_slot = Warp::kSplitsColumns ? half * Warp::kSlots : 0;
  const std::int64_t n0 = std::int64_t(blockIdx.y) * kTiledN;
  const int all_blocks = int((p.k + Stage::kCols - 1) / Stage::kCols);
  const int begin = all_blocks * rank / splits;
  const int num_blocks = all_blocks * (rank + 1) / splits - begin;

  const std::uint8_t* packed = p.packed + tile.weight * p.weight_batch_bytes;
  const auto* scale = static_cast<const std::uint8_t*>(p.scale) + tile.weight * p.scale_batch_bytes;
  const std::uint8_t* zero =
      p.zero_point ? p.zero_point + tile.weight * p.zero_batch_bytes : nullptr;
  const int groups = kInt4 ? kBlockCols / p.group_size : 1;  // of one block

  // Rows of x of this CTA's slice of the sums, which the cluster sends to it.
  const int my_rows = (tile.count - rank + splits - 1) / splits;
  if (splits > 1 && thread == 0) {
    device::barrier_init(&parts_arrived, 1);
    device::barrier_init_fence();
    device::barrier_expect(&parts_arrived, unsigned(splits * my_rows * kTiledN * 4));
  }

  // Where this thread's pieces of block `begin` lie. Weight rows behind the last read the first
  // tile again: nobody stores what they add up to.
  const std::uint8_t* weight_from[kPieces];
  const std::uint8_t* scale_from = scale;
  const std::uint8_t* zero_from = zero;
  const int scale_chunks = 2 * groups;  // of a tile of 16 rows and a block
  if constexpr (kFormat == WeightFormat::kDense) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = i * kTiledThreads + thread;  // [tile of 16][slot][half][lane]
      const int piece = chunk / 32 % (2 * kSlots);
      const std::int64_t row = n0 + chunk / 32 / (2 * kSlots) * 16 + piece % 2 * 8 + g;
      weight_from[i] = packed + (row < p.n ? row * p.weight_row_bytes : 0) +
                       (std::int64_t(begin) * Stage::kCols + piece / 2 * kSlotCols + t * 8) * 2;
    }
  } else {
    const std::int64_t k_blocks = ceil_div(p.k, kBlockCols);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = i * kTiledThreads + thread;
      const std::int64_t tile_n = n0 / 16 + chunk * 16 / Stage::kTileBytes;
      weight_from[i] = packed +
                       ((tile_n * 16 < p.n ? tile_n : 0) * k_blocks + begin) * Stage::kTileBytes +
                       chunk * 16 % Stage::kTileBytes;
    }
    if constexpr (kInt4) {
      // Scales [tile of 16][group][16], the tiles apart in memory and together here.
      std::int64_t tile_n = n0 / 16 + thread / scale_chunks;
      tile_n = tile_n * 16 < p.n ? tile_n : 0;
      scale_from += ((tile_n * k_blocks + begin) * scale_chunks + thread % scale_chunks) * 16;
      tile_n = n0 / 16 + thread / groups;
      tile_n = tile_n * 16 < p.n ? tile_n : 0;
      zero_from += ((tile_n * k_blocks + begin) * groups + thread % groups) * 16;
    }
  }
  int weight_column = begin * Stage::kCols + t * 8;  // dense, of piece 0
  const auto fetch_weight = [&](std::uint8_t* stage) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      std::uint8_t* to = stage + (i * kTiledThreads + thread) * 16;
      if constexpr (kFormat == WeightFormat::kDense) {
        const int piece = (i * kTiledThreads + thread) / 32 % (2 * kSlots);
        const bool valid = weight_column + piece / 2 * kSlotCols < p.k;
        device::copy_async_16(to, valid ? weight_from[i] : packed, valid ? 16 : 0);
        weight_from[i] += Stage::kCols * 2;
      } else {
        device::copy_async_16(to, weight_from[i], 16);
        weight_from[i] += Stage::kTileBytes;
      }
    }
    weight_column += Stage::kCols;
    if constexpr (kInt4) {
      if (thread < kTiledN / 16 * scale_chunks) {
        device::copy_async_16(stage + Stage::kWeightBytes + thread * 16, scale_from, 16);
        scale_from += scale_chunks * 16;
      }
      if (zero != nullptr && thread < kTiledN / 16 * groups) {
        device::copy_async_16(stage + Stage::kWeightBytes + Stage::kScaleBytes + thread * 16,
                              zero_from, 16);
        zero_from += groups * 16;
      }
    }
  };
#pragma unroll
  for (int i = 0; i < Stage::kCount - 1; ++i) {
    if (i < num_blocks) fetch_weight(shared + i * Stage::kTotalBytes);
  }
  dependent.wait();  // the weights are on their way; x may still be written

  // Rows behind the last read the first again, which nobody stores either.
  const X* x_from[kXCopies];
#pragma unroll
  for (int i = 0; i < kXCopies; ++i) {
    const int row = (i * kTiledThreads + thread) / kChunks;
    x_from[i] = static_cast<const X*>(p.x) + x_offset(p, tile, row < tile.count ? row : 0) +
                std::int64_t(begin) * Stage::kCols + thread % kChunks * 8;
  }
  int x_left = int(p.k) - (begin * Stage::kCols + thread % kChunks * 8);  // columns
  const auto fetch_x = [&](std::uint8_t* stage) {
    std::uint8_t* x_stage = stage + Stage::kTotalBytes - Stage::kXBytes;
    const int bytes = min(max(x_left, 0), 8) * 2;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      const int row = (i * kTiledThreads + thread) / kChunks;
      if (row < kX) {
        device::copy_async_16(x_stage + x_chunk(row, thread % kChunks, kChunks),
                              bytes > 0 ? x_from[i] : static_cast<const X*>(p.x), bytes);
      }
      x_from[i] += Stage::kCols;
    }
    x_left -= Stage::kCols;
  };
#pragma unroll
  for (int i = 0; i < Stage::kCount - 1; ++i) {
    if (i < num_blocks) fetch_x(shared + i * Stage::kTotalBytes);
    device::copy_async_commit();
  }

  float sum[2][kXTiles][4] = {};
  SlotZero<kFormat, X> slot_zero[2] = {{8, 8}, {8, 8}};
  std::uint8_t* const ring_end = shared + Stage::kCount * Stage::kTotalBytes;
  std::uint8_t* stage = shared;
  std::uint8_t* next_stage = shared + (Stage::kCount - 1) * Stage::kTotalBytes;
  for (int block = 0; block < num_blocks; ++block) {
    float block_scale = 1.0F;
    if constexpr (kFormat == WeightFormat::kFp8) {
      if (p.block_scale) {
        block_scale = reinterpret_cast<const float*>(
            scale)[n0 / 128 * ceil_div(p.k, kBlockCols) + begin + block];
      }
    }
    device::copy_async_wait<Stage::kCount - 2>();
    __syncthreads();  // this stage has arrived for all, and all have left the one fetched next
    if (block + Stage::kCount - 1 < num_blocks) {
      fetch_weight(next_stage);
      fetch_x(next_stage);
    }
    device::copy_async_commit();

    const std::uint8_t* x_stage = stage + Stage::kTotalBytes - Stage::kXBytes;
    float partial[2][kXTiles][4] = {};
#pragma unroll
    for (int i = 0; i < Warp::kSlots; ++i) {
      const int a = first_slot + i;
      uint4 x[kXTiles];
#pragma unroll
      for (int tx = 0; tx < kXTiles; ++tx) {
        x[tx] = *reinterpret_cast<const uint4*>(
            x_stage + x_chunk(first_row + tx * 8 + g, a * 4 + t, kChunks));
      }
      const int group = kInt4 ? a * groups / kSlots : 0;
#pragma unroll
      for (int tn = 0; tn < 2; ++tn) {
        const int tile_n = warp_n * 2 + tn;  // of the CTA
        const auto slot = read_slot<kFormat>(stage + tile_n * Stage::kTileBytes, a, lane);
        if constexpr (kMixed) {
#pragma unroll
          for (int tx = 0; tx < kXTiles; ++tx) multiply_slot_mixed<W, X>(sum[tn][tx], slot, x[tx]);
        } else {
          const int first = (tile_n * groups + group) * 16 + g;  // of this lane's scales
          if (kInt4 && zero != nullptr) {
            const std::uint8_t* zeros = stage + Stage::kWeightBytes + Stage::kScaleBytes;
            slot_zero[tn] = SlotZero<kFormat, X>(zeros[first], zeros[first + 8]);
          }
          std::uint32_t operands[2][4];
          slot_operands<kFormat, X>(slot, slot_zero[tn], operands);
#pragma unroll
          for (int tx = 0; tx < kXTiles; ++tx) {
            if constexpr (kFormat == WeightFormat::kDense) {
              multiply_slot<X>(sum[tn][tx], operands, x[tx]);
            } else {
              multiply_slot<X>(partial[tn][tx], operands, x[tx]);
            }
          }
          if (kFormat != WeightFormat::kDense &&
              (i == Warp::kSlots - 1 || (kInt4 && group != (a + 1) * groups / kSlots))) {
            const auto* scales = reinterpret_cast<const __half*>(stage + Stage::kWeightBytes);
            const float s0 = kInt4 ? __half2float(scales[first]) : block_scale;
            const float s1 = kInt4 ? __half2float(scales[first + 8]) : block_scale;
#pragma unroll
            for (int tx = 0; tx < kXTiles; ++tx) {
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
    stage += Stage::kTotalBytes;
    if (stage == ring_end) stage = shared;
    next_stage += Stage::kTotalBytes;
    if (next_stage == ring_end) next_stage = shared;
  }

  // Through shared memory, so that rows of out are written in whole lines.
  device::copy_async_wait<0>();
  if (splits > 1) device::cluster_arrive_relaxed();  // this CTA's ring is free
  __syncthreads();
  auto* out_tile = reinterpret_cast<float*>(shared);
  constexpr int kPartFloats = kX * kTiledOutPitch;
  {
    float* part = out_tile + (Warp::kSplitsColumns ? half * kPartFloats : 0);
#pragma unroll
    for (int tn = 0; tn < 2; ++tn) {
#pragma unroll
      for (int tx = 0; tx < kXTiles; ++tx) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = first_row + tx * 8 + t * 2 + j % 2;
          const int column = warp_n * 32 + tn * 16 + j / 2 * 8 + g;
          part[row * kTiledOutPitch + column] = sum[tn][tx][j];
        }
      }
    }
  }
  __syncthreads();
  const float* parts = out_tile;
  int num_parts = Warp::kParts, part_floats = kPartFloats, pitch = kTiledOutPitch;
  if (splits > 1) {
    auto* received = reinterpret_cast<float*>(shared + TiledShared<kFormat, kX>::kOutBytes);
    num_parts = splits;
    pitch = kTiledN;
    device::cluster_wait();  // every CTA's ring is free
    const int quad = lane * 4;
    for (int row = thread / 32; row < tile.count; row += kTiledThreads / 32) {
      float4 value = *reinterpret_cast<const float4*>(out_tile + row * kTiledOutPitch + quad);
      if constexpr (Warp::kParts == 2) {
        const float4 other =
            *reinterpret_cast<const float4*>(out_tile + kPartFloats + row * kTiledOutPitch + quad);
        value.x += other.x;
        value.y += other.y;
        value.z += other.z;
        value.w += other.w;
      }
      const int owner = row % splits;
      const int owner_rows = (tile.count - owner + splits - 1) / splits;
      device::store_cluster_async(received + (rank * owner_rows + row / splits) * kTiledN + quad,
                                  value, &parts_arrived, unsigned(owner));
    }
    device::barrier_wait(&parts_arrived, 0);
    parts = received;
    part_floats = my_rows * kTiledN;
  }
  const std::int64_t n = n0 + thread % kTiledN;
  if (n >= p.n) return;
  float unit = 1.0F;
  if constexpr (kHasChannelScale<kFormat>) {
    unit = kCodeUnit<kFormat, X>;
    if (!p.block_scale) unit *= reinterpret_cast<const float*>(scale)[n];
  }
  for (int i = thread / kTiledN; i < my_rows; i += kTiledThreads / kTiledN) {
    float value = 0.0F;
    for (int part = 0; part < num_parts; ++part) {
      value += parts[part * part_floats + i * pitch + thread % kTiledN];
    }
    store_product(p, out_offset(p, tile, rank + i * splits), n, value * unit);
  }
#endif
}

/// CTAs that share a tile: as many as give the fewest rounds of stages and set-ups. The constants
/// are quarters of the time that a stage takes a CTA alone on its SM, and fit an H100's times.
/// @param max_clusters [size]: clusters that run at once with a CTA on every SM.
inline int tiled_splits(std::int64_t tiles, std::int64_t stages, const int* max_clusters) {
  constexpr std::int64_t kStage = 4, kStageOfTwo = 8, kSetup = 20, kMeeting = 8;
  int best = 1;
  std::int64_t best_cost = 0;
  for (int s = 1; s <= kMaxSplits && s <= std::max<std::int64_t>(stages, 1); ++s) {
    if (max_clusters[s] < 1) continue;
    const std::int64_t rounds = ceil_div(tiles, 2 * max_clusters[s]);
    const std::int64_t stage = tiles <= max_clusters[s] ? kStage : kStageOfTwo;
    const std::int64_t cost =
        rounds * (ceil_div(stages, s) * stage + kSetup + (s > 1 ? kMeeting : 0));
    if (s == 1 || cost < best_cost) {
      best = s;
      best_cost = cost;
    }
  }
  return best;
}

template <WeightFormat kFormat, class W, class X, int kX>
void launch_tiled(const ProductArgs& p, int num_batches, const device::Traits& traits,
                  cudaStream_t stream) {
  const auto kernel = tiled_kernel<kFormat, W, X, kX>;
  constexpr int kBytes = TiledShared<kFormat, kX>::kBytes;
  FASTGPT_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const std::int64_t row_tiles = num_row_tiles(p, kX), weight_tiles = ceil_div(p.n, kTiledN);
  int splits = 1;
  if (traits.arch >= 90 && p.sorted_rows == nullptr) {
    splits = tiled_splits(row_tiles * weight_tiles * num_batches,
                          ceil_div(p.k, TiledStage<kFormat, kX>::kCols),
                          device::hopper_traits().max_clusters);
  }
  const dim3 grid(unsigned(row_tiles * splits), unsigned(weight_tiles), unsigned(num_batches));
  device::launch(kernel, grid, kTiledThreads, kBytes, stream, p, unsigned(splits));
}

}  // namespace fastgpt::gemm
