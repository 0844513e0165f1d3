#include <algorithm>

#include "attention/wgmma_tile.cuh"
#include "device/dependent.cuh"
#include "device/hopper.cuh"
#include "device/launch.cuh"
#include "fastgpt/check.h"

namespace fastgpt::attention {
namespace {

constexpr int kThreads = 3 * kGroupThreads;
constexpr int kRows = kGroupRows;  // query rows of a CTA
constexpr int kKeys = 64;          // of a step
constexpr int kStages = 2;
constexpr int kHeadDimQk = 576;
constexpr int kHeadDimV = 512;
constexpr int kGroupColumns = kHeadDimV / 2;       // of the output, a warp group
constexpr int kTileBytes = kKeys * kTileRowBytes;  // 64 keys, queries or probabilities by 64
constexpr int kTiles = kHeadDimQk / kTileColumns;  // of a stage, and of the queries

// A stage is filled and released in pieces, because its last reader differs: the scores alone read
// the rotary columns, warp group 0 reads the first half of the values last, and group 1 the second.
constexpr int kPieces = 3;
[[maybe_unused]] __device__ constexpr int first_tile(int piece) {
  return piece < kPieces ? 4 * piece : kTiles;
}

struct MlaArgs {
  CUtensorMap kv;  // [num_blocks][slot][column]
  PagedArgs paged;
  int box_rows;  // consecutive slots of a block that one copy brings
};

struct Shared {
  unsigned char queries[kTiles * kTileBytes];
  unsigned char stages[kStages][kTiles * kTileBytes];
  unsigned char probabilities[kTileBytes];
  float row_factor[kRows];  // what group 1 multiplies its outputs by
  std::uint64_t full[kStages][kPieces];
  std::uint64_t empty[kStages][kPieces];
  std::uint64_t ready;  // group 0 has written a tile's probabilities and factors
  std::uint64_t taken;  // group 1 has read them
};
static_assert(sizeof(Shared) <= 227 << 10);

// Named barriers of the two multiplying groups.
enum : int {
  kAll = 1,  // both
  kOwn,      // group 0 among itself
};

// The keys of one CTA.
struct Work {
  RequestView request;
  int first_row;
  int num_rows;
  int begin;  // first key
  int num_tiles;
  bool is_split;
  bool exists;
};

[[maybe_unused]] __device__ Work this_work(const PagedArgs& args) {
  Work work{};
  work.request = request_view(args, int(blockIdx.z));
  work.first_row = int(blockIdx.x) * kRows;
  work.num_rows = work.request.q_len * args.num_heads;
  const int split = int(blockIdx.y);
  const KeyRange range = split_range(work.request, args.num_splits, split);
  work.exists = work.first_row < work.num_rows && split < range.num_active &&
                (split == 0 || work.request.q_len <= kMaxDecodeTokens);
  work.is_split = work.request.q_len <= kMaxDecodeTokens && range.num_active > 1;
  const int last_token = min((work.first_row + kRows - 1) / args.num_heads, work.request.q_len - 1);
  const int end = min(range.end, work.request.num_keys(last_token));
  work.begin = range.begin;
  const int num_tiles = end > range.begin ? (end - range.begin + kKeys - 1) / kKeys : 0;
  // One value a warp, but loaded: only after a shuffle does the compiler know.
  work.num_tiles = __shfl_sync(~0U, num_tiles, 0);
  return work;
}

[[maybe_unused]] __device__ void produce(const MlaArgs& args, const Work& work, Shared& shared) {
  const int lane = int(threadIdx.x % 32);
  const int boxes = kKeys / args.box_rows;  // of a tile of keys, one a lane
  const auto fetch_block = [&](int tile) {
    const int key = work.begin + tile * kKeys + lane * args.box_rows;
    const bool exists = tile < work.num_tiles && lane < boxes && key < work.request.seq_len;
    return exists ? work.request.block_table[key / args.paged.block_size] : -1;
  };
  int next = fetch_block(0);
  for (int tile = 0; tile < work.num_tiles; ++tile) {
    const int block = next;
    next = fetch_block(tile + 1);
    const int stage = tile % kStages;
    const int slot = (work.begin + tile * kKeys + lane * args.box_rows) % args.paged.block_size;
    unsigned char* target = shared.stages[stage] + lane * args.box_rows * kTileRowBytes;
    const unsigned present = __popc(__ballot_sync(~0U, block >= 0));
#pragma unroll
    for (int piece = kPieces - 1; piece >= 0; --piece) {
      std::uint64_t* full = &shared.full[stage][piece];
      const int tiles = first_tile(piece + 1) - first_tile(piece);
      device::barrier_wait(&shared.empty[stage][piece], (tile / kStages + 1) % 2);
      if (lane == 0) {
        device::barrier_expect(full, present * unsigned(args.box_rows * tiles * kTileRowBytes));
      }
      __syncwarp();
      if (block < 0) continue;
      for (int c = first_tile(piece); c < first_tile(piece + 1); ++c) {
        device::copy_box(target + c * kTileBytes, args.kv, full, c * kTileColumns, slot, block);
      }
    }
  }
}

// Both multiplying groups copy the queries.
template <class T>
__device__ void load_queries(const PagedArgs& args, const Work& work, Shared& shared) {
  constexpr int kWarpRows = kRows / 8;
  const int warp = int(threadIdx.x / 32) - 4;
  const int lane = int(threadIdx.x % 32);
  const int row = work.first_row + warp * kWarpRows + lane;
  std::int64_t offset = -1;
  if (lane < kWarpRows && row < work.num_rows) {
    const int token = row / args.num_heads;
    offset = (work.request.first_token + token) * args.q_token_stride +
             (row - token * args.num_heads) * args.q_head_stride;
  }
#pragma unroll
  for (int c = 0; c < kTiles; ++c) {
    copy_rows_async<kTileColumns, kWarpRows>(
        reinterpret_cast<T*>(shared.queries + c * kTileBytes), warp * kWarpRows,
        static_cast<const T*>(args.q) + c * kTileColumns, offset, kTileColumns);
  }
  device::commit_async_copies();
  device::wait_async_copies<0>();
  device::fence_async_proxy();
  device::named_barrier<kAll>(2 * kGroupThreads);
}

// Columns 256 group .. 256 group + 255 of the 64 output rows.
template <class T>
__device__ void store(const PagedArgs& args, const Work& work,
                      const float (&out)[kGroupColumns / 2], const float (&inverse)[2], int group) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = work.first_row + first_group_row() + r * 8;
    if (row >= work.num_rows) continue;
    const int token = row / args.num_heads;
    const int head = row - token * args.num_heads;
    const int column = group * kGroupColumns + int(threadIdx.x % 4) * 2;
    if (work.is_split) {
      const std::int64_t slot = partial_row(args, int(blockIdx.y), int(blockIdx.z), token, head);
      float* target = args.partial + slot * kHeadDimV + column;
#pragma unroll
      for (int n = 0; n < kGroupColumns / 8; ++n) {
        *reinterpret_cast<float2*>(target + n * 8) =
            make_float2(out[4 * n + 2 * r] * inverse[r], out[4 * n + 2 * r + 1] * inverse[r]);
      }
    } else {
      T* target = static_cast<T*>(args.out) +
                  (work.request.first_token + token) * args.out_token_stride +
                  head * args.out_head_stride + column;
#pragma unroll
      for (int n = 0; n < kGroupColumns / 8; ++n) {
        *reinterpret_cast<std::uint32_t*>(target + n * 8) = device::pack_pair<T>(
            out[4 * n + 2 * r] * inverse[r], out[4 * n + 2 * r + 1] * inverse[r]);
      }
    }
  }
}

// Start out += p values for this group's columns; p in registers or in shared memory.
template <class T, class P>
__device__ void start_outputs(float (&out)[kGroupColumns / 2], const P& p, Shared& shared,
                              int stage, int group) {
  device::wgmma_fence();
  const std::uint64_t v = device::wgmma_transposed_operand(
      device::smem_address(shared.stages[stage] + group * (kGroupColumns / 64) * kTileBytes),
      kTileBytes);
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    device::wgmma<T, true>(out, p(i), v + i * kNextK16);
  }
  device::wgmma_commit();
}

// Warp group 0: all scores, the softmax, and the first half of the outputs.
template <class T>
struct Scorer {
  const PagedArgs& args;
  const Work& work;
  Shared& shared;

  float scores[kKeys / 2];
  std::uint32_t p[kKeys / 16][4];
  float out[kGroupColumns / 2];
  SoftmaxRows softmax;
  int limit[2];  // keys each of this thread's rows may see

  __device__ void release(int stage, int piece) const {
    if (threadIdx.x % 32 == 0) {
      device::barrier_arrive(&shared.empty[stage][piece], 1);
    }
  }

  // Columns of one piece, once it is there; the last piece comes first.
  template <int kPiece>
  __device__ void start_piece(int tile) {
    constexpr bool kFirst = kPiece == kPieces - 1;
    constexpr int kBegin = first_tile(kPiece) * 4;  // in steps of 16 columns
    const int stage = tile % kStages;
    const std::uint64_t q =
        device::wgmma_fresh(device::wgmma_operand(device::smem_address(shared.queries)));
    const std::uint64_t k =
        device::wgmma_fresh(device::wgmma_operand(device::smem_address(shared.stages[stage])));
    const auto at = [](int i) { return i / 4 * (kTileBytes >> 4) + i % 4 * 2; };
    device::barrier_wait(&shared.full[stage][kPiece], tile / kStages % 2);
    if constexpr (kFirst) hold_all(scores, p, out);
    device::wgmma_fence();
    device::wgmma<T, false, !kFirst>(scores, q + at(kBegin), k + at(kBegin));
#pragma unroll
    for (int i = kBegin + 1; i < first_tile(kPiece + 1) * 4; ++i) {
      device::wgmma<T>(scores, q + at(i), k + at(i));
    }
  }

  __device__ void start_scores(int tile) {
    start_piece<2>(tile);
    start_piece<1>(tile);
    start_piece<0>(tile);
    device::wgmma_commit();
  }

  __device__ void start_own_outputs(int tile) {
    start_outputs<T>(
        out, [&](int i) -> const std::uint32_t (&)[4] { return p[i]; }, shared, tile % kStages, 0);
  }

  __device__ void clear_values(int tile) const {
    const int first_row = work.request.seq_len - work.begin - tile * kKeys;
    if (first_row >= kKeys) return;
    clear_rows<kKeys, kHeadDimV / kTileColumns>(shared.stages[tile % kStages], first_row);
    device::named_barrier<kOwn>(kGroupThreads);
  }

  __device__ void share_factors(const float (&factor)[2]) const {
    const int row = first_group_row();
    if (threadIdx.x % 4 == 0) {
      shared.row_factor[row] = factor[0];
      shared.row_factor[row + 8] = factor[1];
    }
  }

  // Pack the probabilities, and give them to group 1.
  __device__ void share_probabilities(const float (&factor)[2]) {
    const int lane = int(threadIdx.x % 32);
    const int row = first_group_row();
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      p[i / 4][i % 4] = device::pack_pair<T>(scores[2 * i], scores[2 * i + 1]);
      T* tile = reinterpret_cast<T*>(shared.probabilities);
      *reinterpret_cast<std::uint32_t*>(tile + tile_index<kTileColumns>(row + i % 2 * 8, i / 2) +
                                        lane % 4 * 2) = p[i / 4][i % 4];
    }
    share_factors(factor);
    device::fence_async_proxy();
    device::barrier_arrive(&shared.ready, 1);
  }

  template <bool kHide>
  __device__ void step(int tile) {
    start_scores(tile);
    start_own_outputs(tile - 1);
    device::wgmma_wait<1>();
    device::wgmma_hold(scores);
    release(tile % kStages, 2);
    if constexpr (kHide) hide_keys(scores, work.begin + tile * kKeys, limit);
    float factor[2];
    update_softmax(softmax, scores, args.scale, factor);
    device::wgmma_wait<0>();
    hold_all(scores, p, out);
    release((tile - 1) % kStages, 0);
    scale_rows(out, factor);
    if constexpr (kHide) clear_values(tile);
    device::barrier_wait(&shared.taken, (tile - 1) % 2);
    share_probabilities(factor);
  }

  __device__ void run() {
    const int row = work.first_row + first_group_row();
    limit[0] = work.request.num_keys(row / args.num_heads);
    limit[1] = work.request.num_keys((row + 8) / args.num_heads);
    if (work.num_tiles > 0) {
      start_scores(0);
      device::wgmma_wait<0>();
      device::wgmma_hold(scores);
      release(0, 2);
      hide_keys(scores, work.begin, limit);
      float factor[2];
      update_softmax(softmax, scores, args.scale, factor);
      clear_values(0);
      share_probabilities(factor);
      // Keys that every row sees need no comparison.
      const int seen_by_all = work.request.num_keys(work.first_row / args.num_heads) - work.begin;
      const int plain = min(max(seen_by_all, 0) / kKeys, work.num_tiles);
      int tile = 1;
      for (; tile < plain; ++tile) step<false>(tile);
      for (; tile < work.num_tiles; ++tile) step<true>(tile);
      hold_all(scores, p, out);
      start_own_outputs(work.num_tiles - 1);
      device::wgmma_wait<0>();
      hold_all(scores, p, out);
      device::barrier_wait(&shared.taken, (work.num_tiles - 1) % 2);
    }
    softmax.finish();
    float inverse[2];
    inverse_sums(softmax, inverse);
    share_factors(inverse);
    device::barrier_arrive(&shared.ready, 1);
    store<T>(args, work, out, inverse, 0);
    if (work.is_split && threadIdx.x % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + r * 8 >= work.num_rows) continue;
        const int token = (row + r * 8) / args.num_heads;
        args.partial_lse[partial_row(args, int(blockIdx.y), int(blockIdx.z), token,
                                     row + r * 8 - token * args.num_heads)] =
            natural_lse(softmax.maximum[r], softmax.sum[r], args.scale);
      }
    }
  }
};

// Warp group 1: the second half of the outputs, from the probabilities of group 0.
template <class T>
__device__ void accumulate(const PagedArgs& args, const Work& work, Shared& shared) {
  const int row = first_group_row();
  const std::uint64_t p = device::wgmma_operand(device::smem_address(shared.probabilities));
  float out[kGroupColumns / 2];
#pragma unroll
  for (int i = 0; i < kGroupColumns / 2; ++i) out[i] = 0.0F;
  for (int tile = 0; tile < work.num_tiles; ++tile) {
    device::barrier_wait(&shared.ready, tile % 2);
    const float factor[2] = {shared.row_factor[row], shared.row_factor[row + 8]};
    scale_rows(out, factor);
    device::wgmma_hold(out);
    start_outputs<T>(
        out, [&](int i) { return p + std::uint64_t(i) * 2; }, shared, tile % kStages, 1);
    device::wgmma_wait<0>();
    device::wgmma_hold(out);
    if (threadIdx.x % 32 == 0) {
      device::barrier_arrive(&shared.empty[tile % kStages][1], 1);
    }
    device::barrier_arrive(&shared.taken, 1);
  }
  device::barrier_wait(&shared.ready, work.num_tiles % 2);
  const float inverse[2] = {shared.row_factor[row], shared.row_factor[row + 8]};
  store<T>(args, work, out, inverse, 1);
}

// One CTA owns one split of the keys for 64 query rows, row = token * num_heads + head. A latent
// row is copied once and used twice, as key (576 columns) and as value (its first 512). 64 x 512
// outputs do not fit one warp group's registers, so two groups cut the columns, and group 0 also
// computes the probabilities, under whose softmax the products with values run:
//
//   group 0   scores 1, outputs 0 | softmax 1 | scores 2, outputs 1 | softmax 2 |
//   group 1                outputs 0          |              outputs 1          |
//
// A third group copies. Grid: (row tiles, num_splits, num_reqs); row tiles run fastest so that they
// share keys in L2. Source: FlashMLA's account of its dense decode kernel, with one group that
// scores instead of two in turn.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    mla_wgmma_kernel(const __grid_constant__ device::Dependent<MlaArgs> dependent) {
#ifdef FASTGPT_HAS_WGMMA
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  const MlaArgs& args = dependent.wait();
  const Work work = this_work(args.paged);
  if (!work.exists) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      for (int piece = 0; piece < kPieces; ++piece) {
        device::barrier_init(&shared.full[i][piece], 1);
        device::barrier_init(&shared.empty[i][piece], 4);  // a group's warps
      }
    }
    // All threads arrive, not a lane for its warp: so racecheck can follow what is ordered.
    device::barrier_init(&shared.ready, kGroupThreads);
    device::barrier_init(&shared.taken, kGroupThreads);
    device::barrier_init_fence();
  }
  __syncthreads();
  const int role = __shfl_sync(~0U, int(threadIdx.x) / kGroupThreads, 0);
  if (role == 0) {
    device::give_back_registers<kProducerRegisters<2>>();
    if (threadIdx.x < 32) produce(args, work, shared);
  } else {
    device::take_registers<kConsumerRegisters<2>>();
    load_queries<T>(args.paged, work, shared);
    if (role == 1) {
      Scorer<T>{args.paged, work, shared, {}, {}, {}, {}, {}}.run();
    } else {
      accumulate<T>(args.paged, work, shared);
    }
  }
#endif
}

template <class T>
void launch(const MlaArgs& args, const Stream& stream) {
  device::allow_shared_bytes<mla_wgmma_kernel<T>>(sizeof(Shared), stream.device);
  const PagedArgs& paged = args.paged;
  const std::int64_t row_tiles =
      (std::int64_t(paged.max_seqlen_q) * paged.num_heads + kRows - 1) / kRows;
  const dim3 grid(unsigned(row_tiles), unsigned(paged.num_splits), unsigned(paged.num_reqs));
  device::launch(mla_wgmma_kernel<T>, grid, dim3(kThreads), sizeof(Shared),
                 static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace

bool has_wgmma_mla(const PagedArgs& args) {
  return device::hopper_traits().has_wgmma && args.num_blocks > 0 &&
         rows_of_a_box(args.block_size, kKeys) > 0 && args.slot_stride > 0 && args.block_stride > 0;
}

void launch_mla_wgmma(const PagedArgs& args, DType dtype, const Stream& stream) {
  const bool is_float16 = dtype == DType::kF16;
  MlaArgs mla{};
  mla.paged = args;
  mla.box_rows = rows_of_a_box(args.block_size, kKeys);
  mla.kv = device::tensor_map(args.kv, is_float16, args.num_blocks, args.block_size, kHeadDimQk,
                              2 * args.block_stride, 2 * args.slot_stride, mla.box_rows);
  if (is_float16) return launch<__half>(mla, stream);
  launch<__nv_bfloat16>(mla, stream);
}

}  // namespace fastgpt::attention
