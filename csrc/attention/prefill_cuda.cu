#include "attention/cache_tile.cuh"
#include "device/dependent.cuh"
#include "device/launch.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"

namespace fastgpt::attention {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 16 * kWarps;  // query rows of a CTA

template <class C, int D>
struct PrefillShape {
  static constexpr int kTileKeys = kIsCode<C> ? 4096 / D : D > 128 ? 32 : 64;
  static constexpr int kTileElements = kTileKeys * D;
  static constexpr int kTilesBytes = 2 * 2 * kTileElements * 2;  // two stages of keys and values
  // Of codes: one tile of each as it comes, and three stages of the scales of keys and values.
  static constexpr int kScaleOffset = kTilesBytes + 2 * kTileElements;
  static constexpr int kBytes = kIsCode<C> ? kScaleOffset + 3 * 2 * kTileKeys * 4 : kTilesBytes;
  static_assert(kBytes <= 64 << 10, "sm_75 has 64 KiB");
};

// A warp expands its rows of a tile of codes, which it has copied itself.
template <class T, class C, int D, int kWarpKeys>
__device__ void expand_rows(T* tile, const unsigned char* codes, int first_row) {
  constexpr int kWidth = kWidth16<C, D>;
  constexpr int kChunks = D / 16;
#pragma unroll
  for (int i = 0; i < kWarpKeys * kChunks / 32; ++i) {
    const int index = i * 32 + int(threadIdx.x % 32);
    const int row = first_row + index / kChunks;
    const int chunk = index % kChunks;
    const uint4 packed = *reinterpret_cast<const uint4*>(
        reinterpret_cast<const std::uint16_t*>(codes) + tile_index<kWidth>(row, chunk));
    const std::uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    std::uint32_t pairs[8];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      expand_codes<T, C>(__byte_perm(words[w], 0, 0x3120), pairs[2 * w], pairs[2 * w + 1]);
    }
    *reinterpret_cast<uint4*>(tile + tile_index<D>(row, 2 * chunk)) = {pairs[0], pairs[1], pairs[2],
                                                                       pairs[3]};
    *reinterpret_cast<uint4*>(tile + tile_index<D>(row, 2 * chunk + 1)) = {pairs[4], pairs[5],
                                                                           pairs[6], pairs[7]};
  }
}

// One CTA owns 64 query rows of one kv head, row = token * group + head, and walks the keys that
// its last row may see; tiles past that are never loaded. A warp owns 16 rows and keeps their
// queries, scores and outputs in registers; keys and values are shared by the four warps:
//
//   barrier | start copy of tile i + 1 | scores, softmax, values of tile i | barrier ...
//
// Codes of a byte are copied to a place of their own and expanded once for the four warps, each the
// rows that it has copied; then a key's scale multiplies its scores, a value's its probabilities:
//
//   expand tile i | start copy of tile i + 1 | barrier | scores, softmax, values of tile i | ...
//
// Rejected: every warp expands fragments, which costs twice what the products do.
// Grid: (row tiles, num_kv_heads, num_reqs), the longest tiles first.
// Source: FlashAttention-2, arXiv:2307.08691.
template <class T, class C, int D>
__global__ void __launch_bounds__(kWarps * 32)
    prefill_kernel(const __grid_constant__ device::Dependent<PagedArgs> dependent) {
#if __CUDA_ARCH__ < 800
  if constexpr (!std::is_same_v<T, __half>) {
    return;  // has_tensor_cores keeps this dtype away
  } else
#endif
  {
    using Shape = PrefillShape<C, D>;
    constexpr int kTileKeys = Shape::kTileKeys;
    constexpr int kWarpKeys = kTileKeys / kWarps;  // rows of a tile that one warp copies
    extern __shared__ __align__(128) unsigned char shared[];
    const PagedArgs& args = dependent.wait();
    T* tiles = reinterpret_cast<T*>(shared);
    [[maybe_unused]] unsigned char* codes = shared + Shape::kTilesBytes;
    [[maybe_unused]] float* scales = reinterpret_cast<float*>(shared + Shape::kScaleOffset);

    const int warp = int(threadIdx.x / 32);
    const int lane = int(threadIdx.x % 32);
    const int kv_head = int(blockIdx.y);
    const RequestView request = request_view(args, int(blockIdx.z));
    const int num_rows = request.q_len * args.group;
    const int first_row = int(gridDim.x - 1 - blockIdx.x) * kRows;
    if (request.q_len < args.min_q_len || first_row >= num_rows) return;
    const int last_token = min((first_row + kRows - 1) / args.group, request.q_len - 1);
    const int end = min(request.seq_len, request.num_keys(last_token));
    const int num_tiles = (end + kTileKeys - 1) / kTileKeys;  // <= 0: no keys, rows become zero

    const C* kv = static_cast<const C*>(args.kv) + kv_head * args.kv_head_stride;
    const auto fetch_block = [&](int tile) {
      const int key = tile * kTileKeys + warp * kWarpKeys + lane;
      return lane < kWarpKeys && key < end ? request.block_table[key / args.block_size] : -1;
    };
    const auto start_copy = [&](int tile, int block) {
      if (tile < num_tiles) {
        const int key = tile * kTileKeys + warp * kWarpKeys + lane;
        const int slot = key % args.block_size;
        const std::int64_t offset =
            block < 0 ? -1 : block * args.block_stride + slot * args.slot_stride;
        if constexpr (kIsCode<C>) {  // copied in pairs of bytes
          constexpr int kWidth = kWidth16<C, D>;
          const std::int64_t pairs = block < 0 ? -1 : offset / 2;
          auto* target = reinterpret_cast<std::uint16_t*>(codes);
          copy_keys_values_async<kWidth, kWarpKeys>(
              target, target + Shape::kTileElements / 2, warp * kWarpKeys,
              reinterpret_cast<const std::uint16_t*>(kv), args.value_offset / 2, pairs,
              args.head_dim_qk / 2, args.head_dim_v / 2);
          if (lane < kWarpKeys) {
            float* of_keys = scales + tile % 3 * 2 * kTileKeys + warp * kWarpKeys + lane;
            const std::int64_t at =
                block * args.scale_block_stride + kv_head * args.scale_head_stride + slot;
            const float* source = args.kv_scale + (block < 0 ? 0 : at);
            copy_scale_async(of_keys, source, block >= 0);
            copy_scale_async(of_keys + kTileKeys,
                             source + (block < 0 ? 0 : args.scale_value_offset), block >= 0);
          }
        } else {
          T* k_tile = tiles + tile % 2 * 2 * Shape::kTileElements;
          copy_keys_values_async<D, kWarpKeys>(k_tile, k_tile + Shape::kTileElements,
                                               warp * kWarpKeys, kv, args.value_offset, offset,
                                               args.head_dim_qk, args.head_dim_v);
        }
      }
      device::commit_async_copies();
    };
    start_copy(0, fetch_block(0));
    int next_block = fetch_block(1);

    const int warp_row = first_row + warp * 16;
    int limit[2];  // keys each of this thread's rows may see
    std::uint32_t q[D / 16][4];
    {
      const T* row_start[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = warp_row + lane / 4 + r * 8;
        const int token = row / args.group;
        const bool valid = row < num_rows;
        limit[r] = valid ? request.num_keys(token) : 0;
        row_start[r] = valid ? static_cast<const T*>(args.q) +
                                   (request.first_token + token) * args.q_token_stride +
                                   (kv_head * args.group + row % args.group) * args.q_head_stride
                             : nullptr;
      }
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const int column = k * 16 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          q[k][i] = load_query_pair(row_start[i % 2], column + i / 2 * 8, args.head_dim_qk);
        }
      }
    }
    // Keys that every row of the warp sees, and keys that any row sees.
    const int warp_last_row = min(warp_row + 15, num_rows - 1);
    const int seen_by_all = warp_row + 15 < num_rows ? request.num_keys(warp_row / args.group) : 0;
    const int seen_by_any = warp_row < num_rows ? request.num_keys(warp_last_row / args.group) : 0;

    float out[D / 8][4] = {};
    SoftmaxRows softmax;
    const float scale_log2 = args.scale * kLog2e;
    for (int tile = 0; tile < num_tiles; ++tile) {
      T* k_tile = tiles + tile % 2 * 2 * Shape::kTileElements;
      T* v_tile = k_tile + Shape::kTileElements;
      device::wait_async_copies<0>();
      if constexpr (kIsCode<C>) {
        __syncwarp();
        expand_rows<T, C, D, kWarpKeys>(k_tile, codes, warp * kWarpKeys);
        expand_rows<T, C, D, kWarpKeys>(v_tile, codes + Shape::kTileElements, warp * kWarpKeys);
        __syncwarp();
      } else {
        __syncthreads();  // tile has landed; every warp is done with the other stage
      }
      start_copy(tile + 1, next_block);
      next_block = fetch_block(tile + 2);
      if constexpr (kIsCode<C>) __syncthreads();  // expanded; nobody reads the stage before it
      const int tile_key = tile * kTileKeys;
      if (tile_key >= seen_by_any) continue;
      [[maybe_unused]] const float* tile_scales = scales + tile % 3 * 2 * kTileKeys;

      float s[kTileKeys / 8][4] = {};
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        if (D > 128 && k * 16 >= args.head_dim_qk) continue;
#pragma unroll
        for (int n = 0; n < kTileKeys / 16; ++n) {
          std::uint32_t b[4];
          device::load_matrix_x4(
              b, device::shared_address(k_tile +
                                        tile_index<D>(n * 16 + (lane & 7) + ((lane >> 4) << 3),
                                                      k * 2 + ((lane >> 3) & 1))));
          device::mma_m16n8k16<T>(s[2 * n], q[k], b[0], b[1]);
          device::mma_m16n8k16<T>(s[2 * n + 1], q[k], b[2], b[3]);
        }
      }
      if constexpr (kIsCode<C>) scale_columns<1>(s, tile_scales, kKeyUnit<T, C>);
      if (tile_key + kTileKeys > seen_by_all) {
        const int first_key = tile_key + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (first_key + n * 8 + e % 2 >= limit[e / 2]) s[n][e] = -INFINITY;
          }
        }
      }
      float factor[2];
      softmax.update(s, scale_log2, factor);
      if (__any_sync(~0U, factor[0] != 1.0F || factor[1] != 1.0F)) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[n][e] *= factor[e / 2];
        }
      }
      if constexpr (kIsCode<C>) scale_columns<1>(s, tile_scales + kTileKeys, kValueUnit<T, C>);
#pragma unroll
      for (int k = 0; k < kTileKeys / 16; ++k) {
        const std::uint32_t p[4] = {device::pack_pair<T>(s[2 * k][0], s[2 * k][1]),
                                    device::pack_pair<T>(s[2 * k][2], s[2 * k][3]),
                                    device::pack_pair<T>(s[2 * k + 1][0], s[2 * k + 1][1]),
                                    device::pack_pair<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          if (D > 128 && n * 16 >= args.head_dim_v) continue;
          std::uint32_t b[4];
          device::load_matrix_x4_transposed(
              b, device::shared_address(v_tile +
                                        tile_index<D>(k * 16 + (lane & 15), n * 2 + (lane >> 4))));
          device::mma_m16n8k16<T>(out[2 * n], p, b[0], b[1]);
          device::mma_m16n8k16<T>(out[2 * n + 1], p, b[2], b[3]);
        }
      }
    }
    softmax.finish();
    device::wait_async_copies<0>();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + lane / 4 + r * 8;
      if (row >= num_rows) continue;
      const float inv = softmax.sum[r] > 0.0F ? kOutUnit<T, C> / softmax.sum[r] : 0.0F;
      T* target = static_cast<T*>(args.out) +
                  (request.first_token + row / args.group) * args.out_token_stride +
                  (kv_head * args.group + row % args.group) * args.out_head_stride;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const int column = n * 8 + lane % 4 * 2;
        if (column < args.head_dim_v) {
          *reinterpret_cast<std::uint32_t*>(target + column) =
              device::pack_pair<T>(out[n][2 * r] * inv, out[n][2 * r + 1] * inv);
        }
      }
    }
  }
}

template <class T, class C, int D>
void launch(const PagedArgs& args, const Stream& stream) {
  constexpr int kBytes = PrefillShape<C, D>::kBytes;
  device::allow_shared_bytes<prefill_kernel<T, C, D>>(kBytes, stream.device);
  const std::int64_t row_tiles = (std::int64_t(args.max_seqlen_q) * args.group + kRows - 1) / kRows;
  const dim3 grid(unsigned(row_tiles), unsigned(args.num_kv_heads), unsigned(args.num_reqs));
  device::launch(prefill_kernel<T, C, D>, grid, kWarps * 32, kBytes,
                 static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace

void launch_prefill(const PagedArgs& args, DType dtype, DType cache_dtype, const Stream& stream) {
  dispatch_cache(dtype, cache_dtype, [&](auto tag, auto cache_tag) {
    using T = decltype(tag);
    using C = decltype(cache_tag);
    if (args.head_dim_qk <= 64) return launch<T, C, 64>(args, stream);
    if (args.head_dim_qk <= 128) return launch<T, C, 128>(args, stream);
    launch<T, C, 256>(args, stream);
  });
}

}  // namespace fastgpt::attention
