// Device code every attention kernel shares: who a row is, where a key lies, how a split is cut.
#pragma once
#include <cuda_runtime.h>

#include "attention/cuda_kernels.h"
#include "device/mma.cuh"
#include "device/ptx.cuh"

namespace fastgpt::attention {

constexpr float kLog2e = 1.44269504088896341F;
constexpr float kLn2 = 0.69314718055994531F;

/// One request as its queries see it.
struct RequestView {
  int first_token;
  int q_len;
  int seq_len;
  const int* block_table;

  /// Number of keys query `token` sees: those up to its own position. <= 0: none.
  __device__ int num_keys(int token) const { return seq_len - q_len + token + 1; }
};

__device__ inline RequestView request_view(const PagedArgs& args, int req) {
  const int first = args.cu_seqlens_q[req];
  return {first, args.cu_seqlens_q[req + 1] - first, args.seq_lens[req],
          args.block_tables + req * args.table_stride};
}

struct KeyRange {
  int begin;
  int end;
  int num_active;  // splits of this request that have keys
};

/// Keys of split `split`. The grid is fixed by max_seq_len, so a captured launch serves any
/// shorter batch: each request cuts its own length, and splits past it have no keys.
__device__ inline KeyRange split_range(const RequestView& request, int num_splits, int split) {
  if (request.q_len > kMaxDecodeTokens) num_splits = 1;
  const int per_split = (request.seq_len + num_splits - 1) / num_splits;
  const int size = max((per_split + kSplitKeys - 1) / kSplitKeys, 1) * kSplitKeys;
  return {split * size, min(request.seq_len, (split + 1) * size),
          max((request.seq_len + size - 1) / size, 1)};
}

/// Row of partial and partial_lse.
__device__ inline std::int64_t partial_row(const PagedArgs& args, int split, int req, int token,
                                           int head) {
  return ((std::int64_t(split) * args.num_reqs + req) * args.tokens_per_req + token) *
             args.num_heads +
         head;
}

/// Index of 16-byte chunk `chunk` of row `row` in a tile with kColumns columns. The XOR spreads
/// the eight rows that one ldmatrix reads over all banks; two rows of 32 columns share a line.
template <int kColumns>
__device__ inline int tile_index(int row, int chunk) {
  static_assert(kColumns % 64 == 0 || kColumns == 32);
  const int turn = kColumns == 32 ? row / 2 & 3 : row & 7;
  return row * kColumns + ((chunk ^ turn) << 3);
}

/// A warp copies kRows rows into a tile from row first_row on. Lane i < kRows brings the offset of
/// row i (-1: zeros), so a block table is read once per row and not once per chunk. Columns from
/// `width` on become zero.
template <int kColumns, int kRows, class T>
__device__ inline void copy_rows_async(T* tile, int first_row, const T* source, std::int64_t offset,
                                       int width) {
  constexpr int kChunks = kColumns / 8;
  const int lane = int(threadIdx.x % 32);
  static_assert(kRows * kChunks % 32 == 0);
#pragma unroll
  for (int i = 0; i < kRows * kChunks / 32; ++i) {
    const int index = i * 32 + lane;
    const int row = index / kChunks;
    const int chunk = index % kChunks;
    const std::int64_t start = __shfl_sync(~0U, offset, row);
    const bool valid = start >= 0 && chunk * 8 < width;
    device::copy_async_16(tile + tile_index<kColumns>(first_row + row, chunk),
                          valid ? source + start + chunk * 8 : source, valid);
  }
}

/// copy_rows_async of keys and of the values `value_offset` behind them, where each row's place is
/// worked out once.
template <int kColumns, int kRows, class T>
__device__ inline void copy_keys_values_async(T* keys, T* values, int first_row, const T* source,
                                              std::int64_t value_offset, std::int64_t offset,
                                              int width_qk, int width_v) {
  constexpr int kChunks = kColumns / 8;
  const int lane = int(threadIdx.x % 32);
  static_assert(kRows * kChunks % 32 == 0);
#pragma unroll
  for (int i = 0; i < kRows * kChunks / 32; ++i) {
    const int index = i * 32 + lane;
    const int row = index / kChunks;
    const int chunk = index % kChunks;
    const std::int64_t start = __shfl_sync(~0U, offset, row);
    const int target = tile_index<kColumns>(first_row + row, chunk);
    const T* from = start >= 0 ? source + start + chunk * 8 : source;
    const T* value_from = start >= 0 ? from + value_offset : source;
    device::copy_async_16(keys + target, from, start >= 0 && chunk * 8 < width_qk);
    device::copy_async_16(values + target, value_from, start >= 0 && chunk * 8 < width_v);
  }
}

/// Two neighbouring query elements as a register of an A fragment; zero outside.
template <class T>
__device__ inline std::uint32_t load_query_pair(const T* row, int column, int width) {
  if (row == nullptr || column >= width) return 0;
  return *reinterpret_cast<const std::uint32_t*>(row + column);
}

/// Running softmax of the two rows (g and g + 8) a thread shares with its quad. Exponents are of
/// two: scores are multiplied by scale * log2(e) inside the exponential.
struct SoftmaxRows {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0F, 0.0F};

  /// Turn raw scores into probabilities; factor[r] rescales what was accumulated before.
  template <int kTiles>
  __device__ void update(float (&s)[kTiles][4], float scale_log2, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = maximum[r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0U, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0U, top, 2));
      // A row without keys so far keeps -inf; 0 in its place avoids inf - inf.
      const float base = top == -INFINITY ? 0.0F : top * scale_log2;
      factor[r] = device::exp2_approximate(maximum[r] * scale_log2 - base);
      maximum[r] = top;
      float part = 0.0F;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        s[n][2 * r] = device::exp2_approximate(fmaf(s[n][2 * r], scale_log2, -base));
        s[n][2 * r + 1] = device::exp2_approximate(fmaf(s[n][2 * r + 1], scale_log2, -base));
        part += s[n][2 * r] + s[n][2 * r + 1];
      }
      sum[r] = sum[r] * factor[r] + part;  // this thread's columns alone, until finish()
    }
  }

  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0U, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0U, sum[r], 2);
    }
  }
};

/// lse of one row, natural; -inf for a row without keys.
__device__ inline float natural_lse(float maximum, float sum, float scale) {
  return sum > 0.0F ? maximum * scale + logf(sum) : -INFINITY;
}

}  // namespace fastgpt::attention
