#include "attention/cache_tile.cuh"
#include "device/cluster.cuh"
#include "device/dependent.cuh"
#include "device/launch.cuh"
#include "device/pack.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"

namespace fastgpt::attention {
namespace {

constexpr int kRows = 16;      // query rows of a CTA: the M of one mma
constexpr int kTileKeys = 16;  // keys of a warp's tile: the K of one mma

template <class C, int D>
struct DecodeShape {
  static constexpr int kWarps = D > 128 ? 2 : 4;
  static constexpr int kTileBytes = kTileKeys * D * int(sizeof(C));
  // Of codes: the scales of 16 keys, then those of their values.
  static constexpr int kScaleBytes = kIsCode<C> ? 2 * kTileKeys * 4 : 0;
  static constexpr int kTilesBytes = 2 * kTileBytes + kScaleBytes;  // a stage of one warp
  static constexpr int kStages = 64 * 1024 / (kWarps * kTilesBytes);
  static constexpr int kMergeStride = D + 8;  // floats; the pad keeps a quad's stores apart
  static constexpr int kStageBytes = kWarps * kStages * kTilesBytes;
  static constexpr int kMergeBytes = kWarps * kRows * (kMergeStride + 2) * 4;
  static constexpr int kReceiveStride = D + 4;  // floats of a row and its lse
  static constexpr int kReceiveBytes = (kRows + kMaxClusterSplits - 1) * kReceiveStride * 4;
  static constexpr int kEndBytes = kMergeBytes + kReceiveBytes + 8;  // and their barrier
  static constexpr int kBytes = kStageBytes > kEndBytes ? kStageBytes : kEndBytes;
  static_assert(kStages >= 2 && kBytes <= 64 << 10, "sm_75 has 64 KiB");
};

// Four columns of a finished row.
template <class T>
__device__ void store_quad(const PagedArgs& args, const RequestView& request, int kv_head, int row,
                           int column, const float4& total, float inv) {
  device::Pack<T, 4> pack;
  pack.values[0] = device::from_float<T>(total.x * inv);
  pack.values[1] = device::from_float<T>(total.y * inv);
  pack.values[2] = device::from_float<T>(total.z * inv);
  pack.values[3] = device::from_float<T>(total.w * inv);
  const int token = row / args.group;
  const int head = kv_head * args.group + row % args.group;
  device::store_pack(static_cast<T*>(args.out) +
                         (request.first_token + token) * args.out_token_stride +
                         head * args.out_head_stride + column,
                     pack);
}

// One CTA owns one split of the keys of one kv head for 16 query rows: the heads of the group are
// packed with the tokens, row = token * group + head, so that a key is loaded once for all of
// them. Its warps take tiles of 16 keys in turn,
//
//   keys  | w0 | w1 | w2 | w3 | w0 | w1 | ...
//
// each with its own pipeline and its own softmax: no barrier until the warps merge at the end.
// Splits that are a cluster merge too: each finishes every num_active-th row, whose parts the
// others store into its shared memory. Else combine_splits_kernel does. Rejected: all warps on one
// tile, which costs two barriers per tile.
// Codes of a byte are multiplied as T, exactly, and summed in float32; a key's scale multiplies its
// scores and a value's its probabilities.
// Grid: (num_splits, row tiles * num_kv_heads, num_reqs).
template <class T, class C, int D>
__global__ void __launch_bounds__(DecodeShape<C, D>::kWarps * 32)
    decode_kernel(const __grid_constant__ device::Dependent<PagedArgs> dependent) {
#if __CUDA_ARCH__ < 800
  if constexpr (!std::is_same_v<T, __half>) {
    return;  // has_tensor_cores keeps this dtype away
  } else
#endif
  {
    using Shape = DecodeShape<C, D>;
    constexpr int kWidth = kWidth16<C, D>;
    constexpr int kWarps = Shape::kWarps;
    constexpr int kStages = Shape::kStages;
    extern __shared__ __align__(128) unsigned char shared[];
    const PagedArgs& args = dependent.wait();

    const int warp = int(threadIdx.x / 32);
    const int lane = int(threadIdx.x % 32);
    const int kv_head = int(blockIdx.y) % args.num_kv_heads;
    const int first_row = int(blockIdx.y) / args.num_kv_heads * kRows;
    const int split = int(blockIdx.x);
    const int req = int(blockIdx.z);
    const RequestView request = request_view(args, req);
    const int num_rows = request.q_len * args.group;
    if (request.q_len > kMaxDecodeTokens || first_row >= num_rows) return;
    const KeyRange range = split_range(request, args.num_splits, split);
    if (split >= range.num_active) return;
    const int last_token = min((first_row + kRows - 1) / args.group, request.q_len - 1);
    const int end = min(range.end, request.num_keys(last_token));
    const int num_tiles = end > range.begin ? (end - range.begin + kTileKeys - 1) / kTileKeys : 0;

    // Rows are copied in pairs of bytes.
    constexpr int kPerElement = 2 / int(sizeof(C));
    const void* kv = static_cast<const C*>(args.kv) + kv_head * args.kv_head_stride;
    unsigned char* tiles = shared + warp * kStages * Shape::kTilesBytes;
    const auto fetch_block = [&](int tile) {
      const int key = range.begin + tile * kTileKeys + lane;
      return lane < kTileKeys && key < end ? request.block_table[key / args.block_size] : -1;
    };
    const auto start_copy = [&](int tile, int stage, int block) {
      if (tile < num_tiles) {
        const int key = range.begin + tile * kTileKeys + lane;
        const std::int64_t offset =
            block < 0 ? -1
                      : (block * args.block_stride + key % args.block_size * args.slot_stride) /
                            kPerElement;
        unsigned char* stage_tiles = tiles + stage * Shape::kTilesBytes;
        copy_keys_values_async<kWidth, kTileKeys>(
            reinterpret_cast<std::uint16_t*>(stage_tiles),
            reinterpret_cast<std::uint16_t*>(stage_tiles + Shape::kTileBytes), 0,
            static_cast<const std::uint16_t*>(kv), args.value_offset / kPerElement, offset,
            args.head_dim_qk / kPerElement, args.head_dim_v / kPerElement);
        if constexpr (kIsCode<C>) {  // a lane copies one scale: of keys, then of values
          const int own = __shfl_sync(~0U, block, lane % kTileKeys);
          const int slot = (range.begin + tile * kTileKeys + lane % kTileKeys) % args.block_size;
          const std::int64_t at = own * args.scale_block_stride +
                                  lane / kTileKeys * args.scale_value_offset +
                                  kv_head * args.scale_head_stride + slot;
          copy_scale_async(reinterpret_cast<float*>(stage_tiles + 2 * Shape::kTileBytes) + lane,
                           args.kv_scale + (own < 0 ? 0 : at), own >= 0);
        }
      }
      device::commit_async_copies();
    };
    // The block id is loaded an iteration before its tile is copied, so the copy never waits.
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      start_copy(warp + s * kWarps, s, fetch_block(warp + s * kWarps));
    }
    int next_block = fetch_block(warp + (kStages - 1) * kWarps);

    std::uint32_t q[D / 16][4];
    int limit[2];  // keys each of this thread's rows may see
    {
      const T* row_start[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + lane / 4 + r * 8;
        const int token = row / args.group;
        const bool valid = row < num_rows;
        limit[r] = valid ? request.num_keys(token) : 0;
        row_start[r] = valid ? static_cast<const T*>(args.q) +
                                   (request.first_token + token) * args.q_token_stride +
                                   (kv_head * args.group + row % args.group) * args.q_head_stride
                             : nullptr;
      }
      load_query_fragments<T, C>(q, row_start, 0, args.head_dim_qk);
    }

    float out[D / 8][4] = {};
    SoftmaxRows softmax;
    const float scale_log2 = args.scale * kLog2e;
    int stage = 0;
    for (int tile = warp; tile < num_tiles; tile += kWarps) {
      const int ahead = tile + (kStages - 1) * kWarps;
      start_copy(ahead, stage == 0 ? kStages - 1 : stage - 1, next_block);
      next_block = fetch_block(ahead + kWarps);
      device::wait_async_copies<kStages - 1>();
      __syncwarp();
      const unsigned char* k_tile = tiles + stage * Shape::kTilesBytes;
      const unsigned char* v_tile = k_tile + Shape::kTileBytes;
      const float* scales = reinterpret_cast<const float*>(v_tile + Shape::kTileBytes);

      float s[2][4] = {};
      add_scores<T, C, kWidth>(s, q, k_tile, 0);
      if constexpr (kIsCode<C>) scale_columns<1>(s, scales, kKeyUnit<T, C>);
      const int first_key = range.begin + tile * kTileKeys + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (first_key + n * 8 + e % 2 >= limit[e / 2]) s[n][e] = -INFINITY;
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
      if constexpr (kIsCode<C>) scale_columns<1>(s, scales + kTileKeys, kValueUnit<T, C>);
      const std::uint32_t p[4] = {
          device::pack_pair<T>(s[0][0], s[0][1]), device::pack_pair<T>(s[0][2], s[0][3]),
          device::pack_pair<T>(s[1][0], s[1][1]), device::pack_pair<T>(s[1][2], s[1][3])};
      add_outputs<T, C, kWidth>(out, p, v_tile, 0, 0);
      __syncwarp();  // the next copy overwrites this stage
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    softmax.finish();
    device::wait_async_copies<0>();
    __syncthreads();

    // The rings have become what is merged here, what other CTAs store, and the barrier for that.
    float* merge = reinterpret_cast<float*>(shared);
    float* received = reinterpret_cast<float*>(shared + Shape::kMergeBytes);
    auto* arrived =
        reinterpret_cast<std::uint64_t*>(shared + Shape::kMergeBytes + Shape::kReceiveBytes);
    const bool is_cluster = device::cluster_size() > 1 && range.num_active > 1;
    const int rows_here = min(num_rows - first_row, kRows);
    const int my_rows = (rows_here - split + range.num_active - 1) / range.num_active;
    if (is_cluster) {
      if (threadIdx.x == 0) {
        device::barrier_init(arrived, 1);
        device::barrier_init_fence();
        device::barrier_expect(arrived,
                               unsigned(range.num_active * my_rows * (args.head_dim_v + 4) * 4));
      }
      __syncwarp();
      device::cluster_arrive_relaxed();
    }
    // Merge the warps: [warp][row][column] and each row's maximum and sum.
    float* maxima = merge + kWarps * kRows * Shape::kMergeStride;
    float* sums = maxima + kWarps * kRows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * kRows + lane / 4 + r * 8;
      for_each_run_of_row<C>(out, r, [&](int column, const auto& values) {
        float* target = merge + row * Shape::kMergeStride + column;
        if constexpr (kIsCode<C>) {
          *reinterpret_cast<float4*>(target) =
              make_float4(values[0], values[1], values[2], values[3]);
        } else {
          *reinterpret_cast<float2*>(target) = make_float2(values[0], values[1]);
        }
      });
      if (lane % 4 == 0) {
        maxima[row] = softmax.maximum[r];
        sums[row] = softmax.sum[r];
      }
    }
    if (is_cluster) device::cluster_wait();
    __syncthreads();
    const int quads = args.head_dim_v / 4;
    for (int i = int(threadIdx.x); i < kRows * quads; i += kWarps * 32) {
      const int row = i / quads;
      const int column = i % quads * 4;
      if (first_row + row >= num_rows) break;
      float top = -INFINITY;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, maxima[w * kRows + row]);
      const float base = top == -INFINITY ? 0.0F : top;
      float sum = 0.0F;
      float4 total = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2f((maxima[w * kRows + row] - base) * scale_log2);
        const float4 part = *reinterpret_cast<const float4*>(
            merge + (w * kRows + row) * Shape::kMergeStride + column);
        sum += weight * sums[w * kRows + row];
        total.x += weight * part.x;
        total.y += weight * part.y;
        total.z += weight * part.z;
        total.w += weight * part.w;
      }
      const float inv = sum > 0.0F ? kOutUnit<T, C> / sum : 0.0F;
      const int token = (first_row + row) / args.group;
      const int head = kv_head * args.group + (first_row + row) % args.group;
      if (is_cluster) {
        const int owner = row % range.num_active;
        const int owner_rows = (rows_here - owner + range.num_active - 1) / range.num_active;
        float* const to =
            received + (split * owner_rows + row / range.num_active) * Shape::kReceiveStride;
        device::store_cluster_async(
            to + column, make_float4(total.x * inv, total.y * inv, total.z * inv, total.w * inv),
            arrived, unsigned(owner));
        if (column == 0) {
          device::store_cluster_async(to + D,
                                      make_float4(natural_lse(top, sum, args.scale), 0, 0, 0),
                                      arrived, unsigned(owner));
        }
        continue;
      }
      if (range.num_active == 1) {
        store_quad<T>(args, request, kv_head, first_row + row, column, total, inv);
      } else {
        const std::int64_t slot = partial_row(args, split, req, token, head);
        *reinterpret_cast<float4*>(args.partial + slot * args.head_dim_v + column) =
            make_float4(total.x * inv, total.y * inv, total.z * inv, total.w * inv);
        if (column == 0) args.partial_lse[slot] = natural_lse(top, sum, args.scale);
      }
    }
    if (!is_cluster) return;
    device::barrier_wait(arrived, 0);
    for (int i = int(threadIdx.x); i < my_rows * quads; i += kWarps * 32) {
      const int mine = i / quads;
      const int column = i % quads * 4;
      const float* from = received + mine * Shape::kReceiveStride;
      const int part_stride = my_rows * Shape::kReceiveStride;
      float top = -INFINITY;
      for (int s = 0; s < range.num_active; ++s) top = fmaxf(top, from[s * part_stride + D]);
      const float base = top == -INFINITY ? 0.0F : top;
      float weights = 0.0F;
      float4 total = {};
      for (int s = 0; s < range.num_active; ++s) {
        const float weight = exp2f((from[s * part_stride + D] - base) * kLog2e);
        const float4 part = *reinterpret_cast<const float4*>(from + s * part_stride + column);
        weights += weight;
        total.x += weight * part.x;
        total.y += weight * part.y;
        total.z += weight * part.z;
        total.w += weight * part.w;
      }
      const float inv = weights > 0.0F ? 1.0F / weights : 0.0F;
      const int row = first_row + mine * range.num_active + split;
      store_quad<T>(args, request, kv_head, row, column, total, inv);
    }
  }
}

template <class T, class C, int D>
void launch(const PagedArgs& args, const Stream& stream) {
  using Shape = DecodeShape<C, D>;
  device::allow_shared_bytes<decode_kernel<T, C, D>>(Shape::kBytes, stream.device);
  const int q_len = args.max_seqlen_q < kMaxDecodeTokens ? args.max_seqlen_q : kMaxDecodeTokens;
  const int row_tiles = (q_len * args.group + kRows - 1) / kRows;
  const dim3 grid(unsigned(args.num_splits), unsigned(row_tiles * args.num_kv_heads),
                  unsigned(args.num_reqs));
  device::launch(decode_kernel<T, C, D>, grid, Shape::kWarps * 32, Shape::kBytes,
                 static_cast<cudaStream_t>(stream.handle), args,
                 args.is_cluster ? unsigned(args.num_splits) : 1U);
}

template <class T, class C>
void launch_size(const PagedArgs& args, const Stream& stream) {
  if (args.head_dim_qk <= 64) return launch<T, C, 64>(args, stream);
  if (args.head_dim_qk <= 128) return launch<T, C, 128>(args, stream);
  launch<T, C, 256>(args, stream);
}

}  // namespace

void launch_decode(const PagedArgs& args, DType dtype, DType cache_dtype, const Stream& stream) {
  dispatch_cache(dtype, cache_dtype, [&](auto tag, auto cache_tag) {
    launch_size<decltype(tag), decltype(cache_tag)>(args, stream);
  });
}

bool has_tensor_cores(DType dtype, const Stream& stream) {
  if (dtype == DType::kF16) return true;
  return dtype == DType::kBF16 &&
         device::compiled_arch<decode_kernel<__nv_bfloat16, __nv_bfloat16, 64>>(stream.device) >=
             80;
}

}  // namespace fastgpt::attention
