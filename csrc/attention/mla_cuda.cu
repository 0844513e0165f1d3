#include <iterator>

#include "attention/cache_tile.cuh"
#include "device/dependent.cuh"
#include "device/launch.cuh"
#include "device/pack.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"
#include "fastgpt/kv_format.h"

namespace fastgpt::attention {
namespace {

constexpr int kRows = 16;  // query rows of a CTA: the M of one mma
constexpr int kWarps = 4;
constexpr int kHeadDimQk = 576;
constexpr int kHeadDimV = 512;
constexpr int kWarpDepth = kHeadDimQk / kWarps;   // columns of q k^T that one warp multiplies
constexpr int kWarpColumns = kHeadDimV / kWarps;  // columns of the output that one warp owns
constexpr int kRopeDim = kHeadDimQk - kHeadDimV;
static_assert(kWarpColumns == kLatentGroup, "a warp's columns have one scale a key");

// A stage holds rows of 576 columns; of codes, rows of 512, rows of 64 rotary columns, and four
// scales a key.
template <class C, int kTileKeys>
struct MlaShape {
  static constexpr int kPeOffset = kTileKeys * kHeadDimV;
  static constexpr int kScaleOffset = kPeOffset + kTileKeys * kRopeDim * 2;
  static constexpr int kTileBytes =
      kIsCode<C> ? kScaleOffset + kTileKeys * 16 : kTileKeys * kHeadDimQk * 2;
  static constexpr int kStageBytes = 2 * kTileBytes;
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
// Of codes, warp w multiplies latent columns 128 w .. 128 w + 127, which share a scale a key, and
// rotary columns 16 w .. 16 w + 15: scores take the scale before they meet, probabilities before
// they multiply the warp's values. Codes are multiplied as T, exactly, and summed in float32.
// Rejected: one warp per 16 keys, which needs 256 registers for outputs alone.
// Grid: (row tiles, num_splits, num_reqs); row tiles run fastest so that they share keys in L2.
template <class T, class C, int kTileKeys>
__global__ void __launch_bounds__(kWarps * 32)
    mla_kernel(const __grid_constant__ device::Dependent<PagedArgs> dependent) {
#if __CUDA_ARCH__ < 800
  if constexpr (!std::is_same_v<T, __half> || kTileKeys > 16) {
    return;  // the launcher never asks for these
  } else
#endif
  {
    using Shape = MlaShape<C, kTileKeys>;
    constexpr int kWidth = kWidth16 < C, kIsCode<C> ? kHeadDimV : kHeadDimQk > ;
    constexpr int kDepth = kIsCode<C> ? kWarpColumns : kWarpDepth;  // of the warp's products
    constexpr int kWarpKeys = kTileKeys / kWarps;  // rows of a tile that one warp copies
    constexpr int kTiles = kTileKeys / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    const PagedArgs& args = dependent.wait();
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

    const auto* kv = static_cast<const std::uint16_t*>(args.kv);  // copied in pairs of bytes
    constexpr int kPerElement = 2 / int(sizeof(C));
    const auto fetch_block = [&](int tile) {
      const int key = range.begin + tile * kTileKeys + warp * kWarpKeys + lane;
      return lane < kWarpKeys && key < end ? request.block_table[key / args.block_size] : -1;
    };
    const auto start_copy = [&](int tile, int block) {
      if (tile < num_tiles) {
        const int key = range.begin + tile * kTileKeys + warp * kWarpKeys + lane;
        const int slot = key % args.block_size;
        const std::int64_t offset =
            block < 0 ? -1 : (block * args.block_stride + slot * args.slot_stride) / kPerElement;
        unsigned char* stage = shared + tile % 2 * Shape::kTileBytes;
        const int row = warp * kWarpKeys;
        copy_rows_async<kWidth, kWarpKeys>(reinterpret_cast<std::uint16_t*>(stage), row, kv, offset,
                                           kWidth);
        if constexpr (kIsCode<C>) {
          const std::int64_t pe_offset =
              block < 0 ? -1 : block * args.pe_block_stride + slot * args.pe_slot_stride;
          copy_rows_async<kRopeDim, kWarpKeys>(reinterpret_cast<T*>(stage + Shape::kPeOffset), row,
                                               static_cast<const T*>(args.pe), pe_offset, kRopeDim);
          if (lane < kWarpKeys) {
            const std::int64_t at = block * args.scale_block_stride + slot * args.scale_slot_stride;
            device::copy_async_16(stage + Shape::kScaleOffset + (row + lane) * 16,
                                  args.kv_scale + (block < 0 ? 0 : at), block >= 0);
          }
        }
      }
      device::commit_async_copies();
    };
    start_copy(0, fetch_block(0));
    int next_block = fetch_block(1);

    int limit[2];  // keys each of this thread's rows may see
    std::uint32_t q[kDepth / 16][4];
    [[maybe_unused]] std::uint32_t q_pe[1][4];
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
      load_query_fragments<T, C>(q, row_start, warp * kDepth, kHeadDimQk);
      if constexpr (kIsCode<C>) {
        load_query_fragments<T, T>(q_pe, row_start, kHeadDimV + warp * 16, kHeadDimQk);
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
      const unsigned char* kv_tile = shared + tile % 2 * Shape::kTileBytes;
      [[maybe_unused]] const float* scales =
          reinterpret_cast<const float*>(kv_tile + Shape::kScaleOffset) + warp;

      float s[kTiles][4] = {};
      add_scores<T, C, kWidth>(s, q, kv_tile, warp * (kDepth * int(sizeof(C)) / 16));
      if constexpr (kIsCode<C>) {
        scale_columns<kWarps>(s, scales, kKeyUnit<T, C>);
        add_scores<T, T, kRopeDim>(s, q_pe, kv_tile + Shape::kPeOffset, warp * 2);
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
      if constexpr (kIsCode<C>) scale_columns<kWarps>(s, scales, kValueUnit<T, C>);
#pragma unroll
      for (int k = 0; k < kTileKeys / 16; ++k) {
        const std::uint32_t p[4] = {device::pack_pair<T>(s[2 * k][0], s[2 * k][1]),
                                    device::pack_pair<T>(s[2 * k][2], s[2 * k][3]),
                                    device::pack_pair<T>(s[2 * k + 1][0], s[2 * k + 1][1]),
                                    device::pack_pair<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
        add_outputs<T, C, kWidth>(out, p, kv_tile, k * 16,
                                  warp * (kWarpColumns * int(sizeof(C)) / 16));
      }
    }
    softmax.finish();
    device::wait_async_copies<0>();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + lane / 4 + r * 8;
      if (row >= num_rows) continue;
      const float inv = softmax.sum[r] > 0.0F ? kOutUnit<T, C> / softmax.sum[r] : 0.0F;
      const int token = row / args.num_heads;
      const int head = row % args.num_heads;
      if (is_split) {
        const std::int64_t slot = partial_row(args, split, req, token, head);
        float* target = args.partial + slot * kHeadDimV + warp * kWarpColumns;
        for_each_run_of_row<C>(out, r, [&](int column, const auto& values) {
#pragma unroll
          for (int i = 0; i < int(std::size(values)); i += 2) {
            *reinterpret_cast<float2*>(target + column + i) =
                make_float2(values[i] * inv, values[i + 1] * inv);
          }
        });
        if (warp == 0 && lane % 4 == 0) {
          args.partial_lse[slot] = natural_lse(softmax.maximum[r], softmax.sum[r], args.scale);
        }
      } else {
        T* target = static_cast<T*>(args.out) +
                    (request.first_token + token) * args.out_token_stride +
                    head * args.out_head_stride + warp * kWarpColumns;
        for_each_run_of_row<C>(out, r, [&](int column, const auto& values) {
#pragma unroll
          for (int i = 0; i < int(std::size(values)); i += 2) {
            *reinterpret_cast<std::uint32_t*>(target + column + i) =
                device::pack_pair<T>(values[i] * inv, values[i + 1] * inv);
          }
        });
      }
    }
  }
}

template <class T, class C, int kTileKeys>
void launch(const PagedArgs& args, const Stream& stream) {
  constexpr int kBytes = MlaShape<C, kTileKeys>::kBytes;
  device::allow_shared_bytes<mla_kernel<T, C, kTileKeys>>(kBytes, stream.device);
  const std::int64_t row_tiles =
      (std::int64_t(args.max_seqlen_q) * args.num_heads + kRows - 1) / kRows;
  const dim3 grid(unsigned(row_tiles), unsigned(args.num_splits), unsigned(args.num_reqs));
  device::launch(mla_kernel<T, C, kTileKeys>, grid, kWarps * 32, kBytes,
                 static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace

void launch_mla(const PagedArgs& args, DType dtype, DType cache_dtype, const Stream& stream) {
  dispatch_cache(dtype, cache_dtype, [&](auto tag, auto cache_tag) {
    using T = decltype(tag);
    using C = decltype(cache_tag);
    if constexpr (std::is_same_v<T, __half>) {
      if (device::compiled_arch<mla_kernel<T, C, 32>>(stream.device) < 80) {
        return launch<T, C, 16>(args, stream);
      }
    }
    launch<T, C, 32>(args, stream);
  });
}

}  // namespace fastgpt::attention
