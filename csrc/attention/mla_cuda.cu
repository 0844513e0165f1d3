#include "attention/paged.cuh"
#include "device/dependent.cuh"
#include "device/launch.cuh"
#include "device/pack.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"

namespace fastgpt::attention {
namespace {

constexpr int kRows = 16;  // query rows of a CTA: the M of one mma
constexpr int kWarps = 4;
constexpr int kHeadDimQk = 576;
constexpr int kHeadDimV = 512;
constexpr int kWarpDepth = kHeadDimQk / kWarps;   // columns of q k^T that one warp multiplies
constexpr int kWarpColumns = kHeadDimV / kWarps;  // columns of the output that one warp owns

template <int kTileKeys>
struct MlaShape {
  static constexpr int kTileElements = kTileKeys * kHeadDimQk;
  static constexpr int kStageBytes = 2 * kTileElements * 2;
  static constexpr int kScoreBytes = kWarps * kRows * kTileKeys * 4;
  static constexpr int kBytes = kStageBytes + kScoreBytes;
  static_assert(kBytes <= (kTileKeys == 16 ? 64 : 99) << 10, "limits of sm_75 and sm_80");
};

// One CTA owns one split of the keys for 16 query rows, row = token * num_heads + head. A latent
// row is loaded once and used twice, as key (576 columns) and as value (its first 512). 16 x 512
// outputs do not fit one warp's registers, so the four warps cut the columns:
//
//   scores:  warp w multiplies columns 144 w .. 144 w + 143; the four partial sums meet in shared
//            memory and every warp adds them in the same order, so all hold the same softmax
//   values:  warp w accumulates output columns 128 w .. 128 w + 127
//
// Rejected: one warp per 16 keys, which needs 256 registers for outputs alone.
// Grid: (row tiles, num_splits, num_reqs); row tiles run fastest so that they share keys in L2.
template <class T, int kTileKeys>
__global__ void __launch_bounds__(kWarps * 32)
    mla_kernel(const __grid_constant__ device::Dependent<PagedArgs> dependent) {
#if __CUDA_ARCH__ < 800
  if constexpr (!std::is_same_v<T, __half> || kTileKeys > 16) {
    return;  // the launcher never asks for these
  } else
#endif
  {
    using Shape = MlaShape<kTileKeys>;
    constexpr int kWarpKeys = kTileKeys / kWarps;  // rows of a tile that one warp copies
    constexpr int kTiles = kTileKeys / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    const PagedArgs& args = dependent.wait();
    T* tiles = reinterpret_cast<T*>(shared);
    float4* scores = reinterpret_cast<float4*>(shared + Shape::kStageBytes);  // [warp][n][lane]

    const int warp = int(threadIdx.x / 32);
    const int lane = int(threadIdx.x % 32);
    const int first_row = int(blockIdx.x) * kRows;
    const int split = int(blockIdx.y);
    const int req = int(blockIdx.z);
    const RequestView request = request_view(args, req);
    const int num_rows = request.q_len * args.num_heads;
    if (first_row >= num_rows) return;
    const KeyRange range = split_range(request, args.num_splits, split);
    if (split >= range.num_active || (split > 0 && request.q_len > kMaxDecodeTokens)) return;
    const bool is_split = request.q_len <= kMaxDecodeTokens && range.num_active > 1;
    const int last_token = min((first_row + kRows - 1) / args.num_heads, request.q_len - 1);
    const int end = min(range.end, request.num_keys(last_token));
    const int num_tiles = end > range.begin ? (end - range.begin + kTileKeys - 1) / kTileKeys : 0;

    const T* kv = static_cast<const T*>(args.kv);
    const auto fetch_block = [&](int tile) {
      const int key = range.begin + tile * kTileKeys + warp * kWarpKeys + lane;
      return lane < kWarpKeys && key < end ? request.block_table[key / args.block_size] : -1;
    };
    const auto start_copy = [&](int tile, int block) {
      if (tile < num_tiles) {
        const int key = range.begin + tile * kTileKeys + warp * kWarpKeys + lane;
        const std::int64_t offset =
            block < 0 ? -1 : block * args.block_stride + key % args.block_size * args.slot_stride;
        copy_rows_async<kHeadDimQk, kWarpKeys>(tiles + tile % 2 * Shape::kTileElements,
                                               warp * kWarpKeys, kv, offset, kHeadDimQk);
      }
      device::commit_async_copies();
    };
    start_copy(0, fetch_block(0));
    int next_block = fetch_block(1);

    int limit[2];  // keys each of this thread's rows may see
    std::uint32_t q[kWarpDepth / 16][4];
    {
      const T* row_start[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + lane / 4 + r * 8;
        const int token = row / args.num_heads;
        const bool valid = row < num_rows;
        limit[r] = valid ? request.num_keys(token) : 0;
        row_start[r] = valid ? static_cast<const T*>(args.q) +
                                   (request.first_token + token) * args.q_token_stride +
                                   row % args.num_heads * args.q_head_stride
                             : nullptr;
      }
#pragma unroll
      for (int k = 0; k < kWarpDepth / 16; ++k) {
        const int column = warp * kWarpDepth + k * 16 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          q[k][i] = load_query_pair(row_start[i % 2], column + i / 2 * 8, kHeadDimQk);
        }
      }
    }

    float out[kWarpColumns / 8][4] = {};
    SoftmaxRows softmax;
    const float scale_log2 = args.scale * kLog2e;
    for (int tile = 0; tile < num_tiles; ++tile) {
      device::wait_async_copies<0>();
      __syncthreads();  // tile has landed; every warp is done with the other stage and the scores
      start_copy(tile + 1, next_block);
      next_block = fetch_block(tile + 2);
      const T* kv_tile = tiles + tile % 2 * Shape::kTileElements;

      float s[kTiles][4] = {};
#pragma unroll
      for (int k = 0; k < kWarpDepth / 16; ++k) {
#pragma unroll
        for (int n = 0; n < kTileKeys / 16; ++n) {
          std::uint32_t b[4];
          device::load_matrix_x4(
              b, device::shared_address(
                     kv_tile +
                     tile_index<kHeadDimQk>(n * 16 + (lane & 7) + ((lane >> 4) << 3),
                                            warp * (kWarpDepth / 8) + k * 2 + ((lane >> 3) & 1))));
          device::mma_m16n8k16<T>(s[2 * n], q[k], b[0], b[1]);
          device::mma_m16n8k16<T>(s[2 * n + 1], q[k], b[2], b[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        scores[(warp * kTiles + n) * 32 + lane] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
      }
      __syncthreads();
      const int first_key = range.begin + tile * kTileKeys + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float4 sum = scores[n * 32 + lane];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) {
          const float4 part = scores[(w * kTiles + n) * 32 + lane];
          sum.x += part.x;
          sum.y += part.y;
          sum.z += part.z;
          sum.w += part.w;
        }
        const int key = first_key + n * 8;
        s[n][0] = key < limit[0] ? sum.x : -INFINITY;
        s[n][1] = key + 1 < limit[0] ? sum.y : -INFINITY;
        s[n][2] = key < limit[1] ? sum.z : -INFINITY;
        s[n][3] = key + 1 < limit[1] ? sum.w : -INFINITY;
      }
      float factor[2];
      softmax.update(s, scale_log2, factor);
      if (__any_sync(~0U, factor[0] != 1.0F || factor[1] != 1.0F)) {
#pragma unroll
        for (int n = 0; n < kWarpColumns / 8; ++n) {
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
        for (int n = 0; n < kWarpColumns / 16; ++n) {
          std::uint32_t b[4];
          device::load_matrix_x4_transposed(
              b, device::shared_address(kv_tile + tile_index<kHeadDimQk>(k * 16 + (lane & 15),
                                                                         warp * (kWarpColumns / 8) +
                                                                             n * 2 + (lane >> 4))));
          device::mma_m16n8k16<T>(out[2 * n], p, b[0], b[1]);
          device::mma_m16n8k16<T>(out[2 * n + 1], p, b[2], b[3]);
        }
      }
    }
    softmax.finish();
    device::wait_async_copies<0>();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + lane / 4 + r * 8;
      if (row >= num_rows) continue;
      const float inv = softmax.sum[r] > 0.0F ? 1.0F / softmax.sum[r] : 0.0F;
      const int token = row / args.num_heads;
      const int head = row % args.num_heads;
      if (is_split) {
        const std::int64_t slot = partial_row(args, split, req, token, head);
        float* target = args.partial + slot * kHeadDimV + warp * kWarpColumns + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kWarpColumns / 8; ++n) {
          *reinterpret_cast<float2*>(target + n * 8) =
              make_float2(out[n][2 * r] * inv, out[n][2 * r + 1] * inv);
        }
        if (warp == 0 && lane % 4 == 0) {
          args.partial_lse[slot] = natural_lse(softmax.maximum[r], softmax.sum[r], args.scale);
        }
      } else {
        T* target = static_cast<T*>(args.out) +
                    (request.first_token + token) * args.out_token_stride +
                    head * args.out_head_stride + warp * kWarpColumns + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kWarpColumns / 8; ++n) {
          *reinterpret_cast<std::uint32_t*>(target + n * 8) =
              device::pack_pair<T>(out[n][2 * r] * inv, out[n][2 * r + 1] * inv);
        }
      }
    }
  }
}

template <class T, int kTileKeys>
void launch(const PagedArgs& args, const Stream& stream) {
  constexpr int kBytes = MlaShape<kTileKeys>::kBytes;
  device::allow_shared_bytes<mla_kernel<T, kTileKeys>>(kBytes, stream.device);
  const std::int64_t row_tiles =
      (std::int64_t(args.max_seqlen_q) * args.num_heads + kRows - 1) / kRows;
  const dim3 grid(unsigned(row_tiles), unsigned(args.num_splits), unsigned(args.num_reqs));
  device::launch(mla_kernel<T, kTileKeys>, grid, kWarps * 32, kBytes,
                 static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace

void launch_mla(const PagedArgs& args, DType dtype, const Stream& stream) {
  if (dtype == DType::kBF16) return launch<__nv_bfloat16, 32>(args, stream);
  const bool is_small = device::compiled_arch<mla_kernel<__half, 32>>(stream.device) < 80;
  if (is_small) return launch<__half, 16>(args, stream);
  launch<__half, 32>(args, stream);
}

}  // namespace fastgpt::attention
