#include "attention/paged.cuh"
#include "device/dependent.cuh"
#include "device/launch.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"

namespace fastgpt::attention {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 16 * kWarps;  // query rows of a CTA

template <int D>
struct PrefillShape {
  static constexpr int kTileKeys = D > 128 ? 32 : 64;
  static constexpr int kTileElements = kTileKeys * D;
  static constexpr int kBytes = 2 * 2 * kTileElements * 2;  // two stages of keys and values
  static_assert(kBytes <= 64 << 10, "sm_75 has 64 KiB");
};

// One CTA owns 64 query rows of one kv head, row = token * group + head, and walks the keys that
// its last row may see; tiles past that are never loaded. A warp owns 16 rows and keeps their
// queries, scores and outputs in registers; keys and values are shared by the four warps:
//
//   barrier | start copy of tile i + 1 | scores, softmax, values of tile i | barrier ...
//
// Grid: (row tiles, num_kv_heads, num_reqs), the longest tiles first.
// Source: FlashAttention-2, arXiv:2307.08691.
template <class T, int D>
__global__ void __launch_bounds__(kWarps * 32)
    prefill_kernel(const __grid_constant__ device::Dependent<PagedArgs> dependent) {
#if __CUDA_ARCH__ < 800
  if constexpr (!std::is_same_v<T, __half>) {
    return;  // has_tensor_cores keeps this dtype away
  } else
#endif
  {
    using Shape = PrefillShape<D>;
    constexpr int kTileKeys = Shape::kTileKeys;
    constexpr int kWarpKeys = kTileKeys / kWarps;  // rows of a tile that one warp copies
    extern __shared__ __align__(128) unsigned char shared[];
    const PagedArgs& args = dependent.wait();
    T* tiles = reinterpret_cast<T*>(shared);

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

    const T* kv = static_cast<const T*>(args.kv) + kv_head * args.kv_head_stride;
    const auto fetch_block = [&](int tile) {
      const int key = tile * kTileKeys + warp * kWarpKeys + lane;
      return lane < kWarpKeys && key < end ? request.block_table[key / args.block_size] : -1;
    };
    const auto start_copy = [&](int tile, int block) {
      if (tile < num_tiles) {
        const int key = tile * kTileKeys + warp * kWarpKeys + lane;
        const std::int64_t offset =
            block < 0 ? -1 : block * args.block_stride + key % args.block_size * args.slot_stride;
        T* k_tile = tiles + tile % 2 * 2 * Shape::kTileElements;
        copy_rows_async<D, kWarpKeys>(k_tile, warp * kWarpKeys, kv, offset, args.head_dim_qk);
        copy_rows_async<D, kWarpKeys>(k_tile + Shape::kTileElements, warp * kWarpKeys,
                                      kv + args.value_offset, offset, args.head_dim_v);
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
      device::wait_async_copies<0>();
      __syncthreads();  // tile has landed; every warp is done with the other stage
      start_copy(tile + 1, next_block);
      next_block = fetch_block(tile + 2);
      const int tile_key = tile * kTileKeys;
      if (tile_key >= seen_by_any) continue;
      const T* k_tile = tiles + tile % 2 * 2 * Shape::kTileElements;
      const T* v_tile = k_tile + Shape::kTileElements;

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
      const float inv = softmax.sum[r] > 0.0F ? 1.0F / softmax.sum[r] : 0.0F;
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

template <class T, int D>
void launch(const PagedArgs& args, const Stream& stream) {
  constexpr int kBytes = PrefillShape<D>::kBytes;
  device::allow_shared_bytes<prefill_kernel<T, D>>(kBytes, stream.device);
  const std::int64_t row_tiles = (std::int64_t(args.max_seqlen_q) * args.group + kRows - 1) / kRows;
  const dim3 grid(unsigned(row_tiles), unsigned(args.num_kv_heads), unsigned(args.num_reqs));
  device::launch(prefill_kernel<T, D>, grid, kWarps * 32, kBytes,
                 static_cast<cudaStream_t>(stream.handle), args);
}

template <class T>
void launch_dtype(const PagedArgs& args, const Stream& stream) {
  if (args.head_dim_qk <= 64) return launch<T, 64>(args, stream);
  if (args.head_dim_qk <= 128) return launch<T, 128>(args, stream);
  launch<T, 256>(args, stream);
}

}  // namespace

void launch_prefill(const PagedArgs& args, DType dtype, const Stream& stream) {
  if (dtype == DType::kF16) return launch_dtype<__half>(args, stream);
  launch_dtype<__nv_bfloat16>(args, stream);
}

}  // namespace fastgpt::attention
