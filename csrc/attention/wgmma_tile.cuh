// What the attention kernels for Hopper share: matrices in shared memory as wgmma and TMA want
// them, in tiles of 64 columns with swizzled rows of 128 bytes, and scores of 64 rows in the
// registers of a warp group.
#pragma once
#include <algorithm>

#include "attention/paged.cuh"
#include "device/bulk.cuh"
#include "device/wgmma.cuh"

namespace fastgpt::attention {

constexpr int kGroupThreads = 128;  // a warp group
constexpr int kGroupRows = 64;      // rows that one of them multiplies
constexpr int kTileColumns = 64;
constexpr int kTileRowBytes = 128;
constexpr int kNextK16 = 16 * kTileRowBytes >> 4;  // descriptor step to 16 rows further down

/// Registers a thread of CTAs with a copying warp group, which needs few, and kConsumers that
/// multiply: 64 Ki in all, in multiples of 8.
template <int kConsumers>
inline constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
template <int kConsumers>
inline constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;

/// The first of the two rows whose scores this thread holds, of its group's 64; the other is + 8.
__device__ inline int first_group_row() {
  return int(threadIdx.x / 32) % 4 * 16 + int(threadIdx.x % 32) / 4;
}

/// Scores of keys that a row does not see become -inf; column 0 is key first_key.
template <int kHalf>
__device__ inline void hide_keys(float (&scores)[kHalf], int first_key, const int (&limit)[2]) {
  const int key = first_key + int(threadIdx.x % 4) * 2;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    if (key + i / 4 * 8 + i % 2 >= limit[i / 2 % 2]) scores[i] = -INFINITY;
  }
}

/// SoftmaxRows::update of scores as wgmma leaves them.
template <int kHalf>
__device__ inline void update_softmax(SoftmaxRows& softmax, float (&scores)[kHalf], float scale,
                                      float (&factor)[2]) {
  softmax.update(reinterpret_cast<float (&)[kHalf / 4][4]>(scores), scale * kLog2e, factor);
}

template <int kHalf>
__device__ inline void scale_rows(float (&out)[kHalf], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kHalf; ++i) out[i] *= factor[i / 2 % 2];
}

/// What finish() left as the factor of a row: 1 / sum, 0 for a row without keys.
__device__ inline void inverse_sums(const SoftmaxRows& softmax, float (&inverse)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) inverse[r] = softmax.sum[r] > 0.0F ? 1.0F / softmax.sum[r] : 0.0F;
}

/// A warp group clears rows first .. kRows - 1 of kTiles neighbouring tiles; a barrier follows. For
/// slots past the sequence: they may hold NaN, which a probability of 0 does not hide.
template <int kRows, int kTiles>
__device__ inline void clear_rows(unsigned char* tiles, int first) {
  for (int i = first * 8 + int(threadIdx.x) % kGroupThreads; i < kRows * 8; i += kGroupThreads) {
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
      *reinterpret_cast<uint4*>(tiles + (c * kRows * 8 + i) * 16) = uint4{};
    }
  }
  device::fence_async_proxy();
}

/// Everything that products read or write in registers, so that nothing of it moves past a wait.
template <int kScores, int kFragments, int kOut>
__device__ inline void hold_all(float (&scores)[kScores], std::uint32_t (&p)[kFragments][4],
                                float (&out)[kOut]) {
  device::wgmma_hold(scores);
#pragma unroll
  for (int i = 0; i < kFragments; ++i) device::wgmma_hold(p[i]);
  device::wgmma_hold(out);
}

/// Host: slots of a block that one bulk copy brings into a tile of tile_keys keys, or 0: the tile
/// is not a whole number of copies, or a copy not of the 8 rows that swizzling exchanges.
inline int rows_of_a_box(int block_size, int tile_keys) {
  const int rows = std::min(block_size, tile_keys);
  return rows % 8 == 0 && tile_keys % rows == 0 && block_size % rows == 0 ? rows : 0;
}

}  // namespace fastgpt::attention
