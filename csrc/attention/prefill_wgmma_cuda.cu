#include <algorithm>

#include "attention/wgmma_tile.cuh"
#include "device/arch.cuh"
#include "device/dependent.cuh"
#include "device/hopper.cuh"
#include "device/launch.cuh"
#include "fastgpt/check.h"

namespace fastgpt::attention {
namespace {

struct PrefillArgs {
  CUtensorMap kv;  // [num_blocks][keys, values][kv head][slot][column]
  PagedArgs paged;
  int box_rows;  // consecutive slots of a block that one copy brings
};

// Shared memory of a CTA. Every matrix lies in tiles of 64 columns:
//
//   queries [kDimQk / 64][kRows][64] | keys, values [stage][columns / 64][kKeys][64] | barriers
//
// With 64 columns exponentials take as long as products, and three groups overlap them better than
// two; wider outputs leave registers for two.
template <int kDimQk, int kDimV>
struct Shape {
  static constexpr int kConsumers = kDimV > 64 ? 2 : 3;  // warp groups that multiply
  static constexpr int kRows = kConsumers * kGroupRows;
  static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
  static constexpr int kKeys = kDimV > 128 ? 64 : 128;   // of a step; bounded by registers
  static constexpr int kStages = kDimQk == 128 ? 3 : 2;  // what fits, and registers to count by

  static constexpr int kQueryTileBytes = kRows * kTileRowBytes;
  static constexpr int kTileBytes = kKeys * kTileRowBytes;
  static constexpr int kKeyBytes = kDimQk / kTileColumns * kTileBytes;
  static constexpr int kValueBytes = kDimV / kTileColumns * kTileBytes;
  static constexpr int kKeyOffset = kDimQk / kTileColumns * kQueryTileBytes;
  static constexpr int kValueOffset = kKeyOffset + kStages * kKeyBytes;
  static constexpr int kKeysFull = kValueOffset + kStages * kValueBytes;
  static constexpr int kKeysEmpty = kKeysFull + 8 * kStages;
  static constexpr int kValuesFull = kKeysEmpty + 8 * kStages;
  static constexpr int kValuesEmpty = kValuesFull + 8 * kStages;
  static constexpr int kBytes = kValuesEmpty + 8 * kStages;
  static_assert(kBytes <= 227 << 10);

  /// Of tile number `count`.
  __device__ static std::uint64_t* barrier(unsigned char* shared, int offset, unsigned count) {
    return reinterpret_cast<std::uint64_t*>(shared + offset) + count % kStages;
  }
};

// Rows of one kv head of one request, row = token * group + head.
struct Work {
  RequestView request;
  int kv_head;
  int first_row;
  int num_rows;  // of the request; 0: no work has this index
  int end;       // keys that the last row sees
};

// Work comes request by request; in one, the longest row tiles first, the kv heads of a tile
// together. A warp finds the request by counting the tiles of 32 at a time, so the grid has room
// for the tiles that a batch of this many tokens can have, not for num_reqs times those of the
// longest query. CTAs take it in turns; every other round goes backwards, so that nobody always
// gets the longest of a round.
template <int kRows>
__device__ Work find_work(const PagedArgs& args, int round) {
  const int lane = int(threadIdx.x % 32);
  const int cta = int(blockIdx.x);
  const int ctas = int(gridDim.x);
  const int index = round * ctas + (round % 2 == 0 ? cta : ctas - 1 - cta);
  Work work{};
  work.kv_head = index % args.num_kv_heads;
  int tile = index / args.num_kv_heads;
  for (int first = 0; first < args.num_reqs; first += 32) {
    const int req = first + lane;
    int tiles = 0;
    RequestView request{};
    if (req < args.num_reqs) {
      request = request_view(args, req);
      if (request.q_len >= args.min_q_len) tiles = (request.q_len * args.group + kRows - 1) / kRows;
    }
    int through = tiles;  // of the requests up to this lane's
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(~0U, through, step);
      if (lane >= step) through += below;
    }
    const unsigned reached = __ballot_sync(~0U, through > tile);
    if (reached != 0) {
      const int owner = __ffs(int(reached)) - 1;
      work.request = {__shfl_sync(~0U, request.first_token, owner),
                      __shfl_sync(~0U, request.q_len, owner),
                      __shfl_sync(~0U, request.seq_len, owner),
                      args.block_tables + (first + owner) * args.table_stride};
      work.num_rows = work.request.q_len * args.group;
      work.first_row = (__shfl_sync(~0U, through, owner) - 1 - tile) * kRows;
      const int last_token = min((work.first_row + kRows - 1) / args.group, work.request.q_len - 1);
      work.end = max(min(work.request.seq_len, work.request.num_keys(last_token)), 0);
      return work;
    }
    tile -= __shfl_sync(~0U, through, 31);
  }
  return work;
}

// One warp copies the keys and values of all work of its CTA, tiles from the last to the first.
template <int kDimQk, int kDimV>
__device__ inline void produce(const PrefillArgs& args, unsigned char* shared) {
  using S = Shape<kDimQk, kDimV>;
  const PagedArgs& paged = args.paged;
  const int lane = int(threadIdx.x % 32);
  const int boxes = S::kKeys / args.box_rows;  // of a tile, one a lane
  unsigned count = 0;
  for (int round = 0;; ++round) {
    const Work work = find_work<S::kRows>(paged, round);
    if (work.num_rows == 0) return;
    const int num_tiles = (work.end + S::kKeys - 1) / S::kKeys;
    const auto fetch_block = [&](int tile) {
      const int key = tile * S::kKeys + lane * args.box_rows;
      const bool exists = tile >= 0 && lane < boxes && key < work.request.seq_len;
      return exists ? work.request.block_table[key / paged.block_size] : -1;
    };
    const auto copy = [&](bool is_value, int tile, int block, unsigned number) {
      const unsigned stage = number % S::kStages;
      std::uint64_t* full = S::barrier(shared, is_value ? S::kValuesFull : S::kKeysFull, number);
      std::uint64_t* empty = S::barrier(shared, is_value ? S::kValuesEmpty : S::kKeysEmpty, number);
      unsigned char* target = shared + (is_value ? S::kValueOffset + stage * S::kValueBytes
                                                 : S::kKeyOffset + stage * S::kKeyBytes);
      const int tiles = (is_value ? kDimV : kDimQk) / kTileColumns;
      const unsigned present = __popc(__ballot_sync(~0U, block >= 0));
      device::barrier_wait(empty, (number / S::kStages + 1) % 2);
      if (lane == 0) {
        device::barrier_expect(full, present * unsigned(args.box_rows * tiles * kTileRowBytes));
      }
      __syncwarp();
      if (block >= 0) {
        const int slot = (tile * S::kKeys + lane * args.box_rows) % paged.block_size;
        for (int c = 0; c < tiles; ++c) {
          device::copy_box(target + c * S::kTileBytes + lane * args.box_rows * kTileRowBytes,
                           args.kv, full,
                           {c * kTileColumns, slot, work.kv_head, int(is_value), block});
        }
      }
    };
    int block = fetch_block(num_tiles - 1);
    int previous = -1;
    for (int tile = num_tiles - 1; tile >= -1; --tile) {
      const int next = fetch_block(tile - 1);
      const unsigned number = count + unsigned(num_tiles - 1 - tile);
      if (tile >= 0) copy(false, tile, block, number);
      if (tile < num_tiles - 1) copy(true, tile + 1, previous, number - 1);
      previous = block;
      block = next;
    }
    count += unsigned(num_tiles);
  }
}

// A warp group that owns 64 query rows: queries in shared memory, scores, probabilities and outputs
// in registers.
template <class T, int kDimQk, int kDimV>
struct Consumer {
  using S = Shape<kDimQk, kDimV>;
  static constexpr int kKeys = S::kKeys;

  const PagedArgs& args;
  unsigned char* shared;
  std::uint32_t base;  // address of shared
  int group_id;

  float scores[kKeys / 2];
  std::uint32_t p[kKeys / 16][4];
  float out[kDimV / 2];
  SoftmaxRows softmax;
  int limit[2];  // keys each of this thread's rows may see

  // Barriers 1 .. kConsumers: the groups take turns to start products, so that one multiplies while
  // another computes its softmax. The next kConsumers: a group among itself.
  __device__ void wait_turn() const { device::named_barrier(1 + group_id, 2 * kGroupThreads); }
  __device__ void pass_turn() const {
    device::named_barrier_arrive(1 + (group_id + 1) % S::kConsumers, 2 * kGroupThreads);
  }
  __device__ void group_barrier() const {
    device::named_barrier(1 + S::kConsumers + group_id, kGroupThreads);
  }

  __device__ unsigned char* queries() const {
    return shared + group_id * kGroupRows * kTileRowBytes;
  }
  __device__ static std::uint32_t parity(unsigned count) { return count / S::kStages % 2; }
  __device__ std::uint64_t* barrier(int offset, unsigned count) const {
    return S::barrier(shared, offset, count);
  }
  __device__ void release(std::uint64_t* empty) const {
    if (threadIdx.x % 32 == 0) device::barrier_arrive(empty, 1);
  }

  // Offset of lane i's row in q or out, of the 16 rows of this warp; -1 past the request.
  __device__ std::int64_t row_offset(const Work& work, std::int64_t token_stride,
                                     std::int64_t head_stride) const {
    const int lane = int(threadIdx.x % 32);
    const int row = work.first_row + group_id * kGroupRows + int(threadIdx.x / 32) % 4 * 16 + lane;
    if (lane >= 16 || row >= work.num_rows) return -1;
    const int token = row / args.group;
    return (work.request.first_token + token) * token_stride +
           (work.kv_head * args.group + row - token * args.group) * head_stride;
  }

  __device__ void load_queries(const Work& work) {
    group_barrier();  // every warp has stored the rows of the previous work
    const std::int64_t offset = row_offset(work, args.q_token_stride, args.q_head_stride);
#pragma unroll
    for (int c = 0; c < kDimQk / kTileColumns; ++c) {
      copy_rows_async<kTileColumns, 16>(reinterpret_cast<T*>(queries() + c * S::kQueryTileBytes),
                                        int(threadIdx.x / 32) % 4 * 16,
                                        static_cast<const T*>(args.q) + c * kTileColumns, offset,
                                        args.head_dim_qk - c * kTileColumns);
    }
    device::commit_async_copies();
    device::wait_async_copies<0>();
    device::fence_async_proxy();
    group_barrier();
  }

  __device__ void start_scores(unsigned count) {
    const std::uint64_t q = device::wgmma_operand(base + group_id * kGroupRows * kTileRowBytes);
    const std::uint64_t k =
        device::wgmma_operand(base + S::kKeyOffset + count % S::kStages * S::kKeyBytes);
    device::wgmma_fence();
    device::wgmma<T, false, false>(scores, q, k);
#pragma unroll
    for (int i = 1; i < kDimQk / 16; ++i) {
      device::wgmma<T>(scores, q + i / 4 * (S::kQueryTileBytes >> 4) + i % 4 * 2,
                       k + i / 4 * (S::kTileBytes >> 4) + i % 4 * 2);
    }
    device::wgmma_commit();
  }

  __device__ void start_outputs(unsigned count) {
    const std::uint64_t v = device::wgmma_transposed_operand(
        base + S::kValueOffset + count % S::kStages * S::kValueBytes, S::kTileBytes);
    device::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) device::wgmma<T, true>(out, p[i], v + i * kNextK16);
    device::wgmma_commit();
  }

  __device__ void pack_probabilities() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      p[i / 4][i % 4] = device::pack_pair<T>(scores[2 * i], scores[2 * i + 1]);
    }
  }

  // Scores of the CTA's tile number `count` while the one before it is multiplied with its values.
  template <bool kHide>
  __device__ void step(int tile, unsigned count) {
    device::barrier_wait(barrier(S::kKeysFull, count), parity(count));
    wait_turn();
    hold_all(scores, p, out);
    start_scores(count);
    device::barrier_wait(barrier(S::kValuesFull, count - 1), parity(count - 1));
    start_outputs(count - 1);
    pass_turn();
    device::wgmma_wait<1>();
    device::wgmma_hold(scores);
    release(barrier(S::kKeysEmpty, count));
    if constexpr (kHide) hide_keys(scores, tile * kKeys, limit);
    float factor[2];
    update_softmax(softmax, scores, args.scale, factor);
    device::wgmma_wait<0>();
    hold_all(scores, p, out);
    release(barrier(S::kValuesEmpty, count - 1));
    scale_rows(out, factor);
    pack_probabilities();
  }

  // Rows go out through the group's queries, which are done with, in lines of 16 bytes a lane: from
  // registers a store would touch eight rows.
  __device__ void store(const Work& work) {
    constexpr int kChunks = kDimV / 8;
    const int warp_row = int(threadIdx.x / 32) % 4 * 16;
    const int lane = int(threadIdx.x % 32);
    T* tile = reinterpret_cast<T*>(queries());
    const auto at = [&](int row, int chunk) {
      return tile + chunk / 8 * (S::kRows * kTileColumns) +
             tile_index<kTileColumns>(warp_row + row, chunk % 8);
    };
    softmax.finish();
    float inverse[2];
    inverse_sums(softmax, inverse);
    group_barrier();  // every warp's products have read the queries
#pragma unroll
    for (int i = 0; i < kDimV / 4; ++i) {
      *reinterpret_cast<std::uint32_t*>(at(lane / 4 + i % 2 * 8, i / 2) + lane % 4 * 2) =
          device::pack_pair<T>(out[2 * i] * inverse[i % 2], out[2 * i + 1] * inverse[i % 2]);
    }
    __syncwarp();
    const std::int64_t offset = row_offset(work, args.out_token_stride, args.out_head_stride);
#pragma unroll
    for (int i = 0; i < 16 * kChunks / 32; ++i) {
      const int row = (i * 32 + lane) / kChunks;
      const int chunk = (i * 32 + lane) % kChunks;
      const std::int64_t start = __shfl_sync(~0U, offset, row);
      if (start >= 0 && chunk * 8 < args.head_dim_v) {
        *reinterpret_cast<uint4*>(static_cast<T*>(args.out) + start + chunk * 8) =
            *reinterpret_cast<const uint4*>(at(row, chunk));
      }
    }
  }

  // Returns the number of key tiles the work had; `count` is that of all work before.
  __device__ int run(const Work& work, unsigned count) {
    load_queries(work);
    const int num_tiles = (work.end + kKeys - 1) / kKeys;
    const int group_row = work.first_row + group_id * kGroupRows;
    limit[0] = work.request.num_keys((group_row + first_group_row()) / args.group);
    limit[1] = work.request.num_keys((group_row + first_group_row() + 8) / args.group);
    softmax = SoftmaxRows{};
#pragma unroll
    for (int i = 0; i < kDimV / 2; ++i) out[i] = 0.0F;
    if (num_tiles > 0) {
      int tile = num_tiles - 1;
      device::barrier_wait(barrier(S::kKeysFull, count), parity(count));
      hold_all(scores, p, out);
      start_scores(count);
      device::wgmma_wait<0>();
      device::wgmma_hold(scores);
      release(barrier(S::kKeysEmpty, count));
      hide_keys(scores, tile * kKeys, limit);
      float factor[2];
      update_softmax(softmax, scores, args.scale, factor);
      pack_probabilities();
      if (num_tiles * kKeys > work.request.seq_len) {
        device::barrier_wait(barrier(S::kValuesFull, count), parity(count));
        // Every group writes the same zeros.
        clear_rows<kKeys, kDimV / kTileColumns>(
            shared + S::kValueOffset + count % S::kStages * S::kValueBytes,
            work.request.seq_len - tile * kKeys);
        group_barrier();
      }
      // Tiles that every row of the group sees need no comparison.
      const int seen_by_all = max(work.request.num_keys(group_row / args.group), 0) / kKeys;
      for (--tile; tile >= seen_by_all; --tile) step<true>(tile, ++count);
      for (; tile >= 0; --tile) step<false>(tile, ++count);
      device::barrier_wait(barrier(S::kValuesFull, count), parity(count));
      hold_all(scores, p, out);
      start_outputs(count);
      device::wgmma_wait<0>();
      hold_all(scores, p, out);
      release(barrier(S::kValuesEmpty, count));
    }
    store(work);
    return num_tiles;
  }
};

// One CTA owns 64 query rows a multiplying warp group, all of one kv head, and walks the keys that
// its last row may see, from the last tile to the first; another warp group copies them. In a
// group, scores of the next tile and outputs of this one are started together, and the softmax runs
// under the latter product and under those of the other groups:
//
//   group 0   scores 1, outputs 0 |  softmax 1  | scores 2, outputs 1 |  softmax 2  |
//   group 1      softmax 0  | scores 1, outputs 0 |  softmax 1  | scores 2, outputs 1 |
//
// Grid: at most one CTA a multiprocessor, which finds its work round by round.
// Source: FlashAttention-3, arXiv:2407.08608.
template <class T, int kDimQk, int kDimV>
__global__ void __launch_bounds__(Shape<kDimQk, kDimV>::kThreads, 1)
    prefill_wgmma_kernel(const __grid_constant__ device::Dependent<PrefillArgs> dependent) {
#ifdef FASTGPT_HAS_WGMMA
  using S = Shape<kDimQk, kDimV>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const PrefillArgs& args = dependent.wait();
  const std::uint32_t base = device::smem_address(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      device::barrier_init(S::barrier(shared, S::kKeysFull, i), 1);
      device::barrier_init(S::barrier(shared, S::kValuesFull, i), 1);
      device::barrier_init(S::barrier(shared, S::kKeysEmpty, i), S::kConsumers * 4);  // warps
      device::barrier_init(S::barrier(shared, S::kValuesEmpty, i), S::kConsumers * 4);
    }
    device::barrier_init_fence();
  }
  __syncthreads();
  const int role = __shfl_sync(~0U, int(threadIdx.x) / kGroupThreads, 0);  // known to be uniform
  if (role == 0) {
    device::give_back_registers<kProducerRegisters<S::kConsumers>>();
    if (threadIdx.x < 32) produce<kDimQk, kDimV>(args, shared);
  } else {
    device::take_registers<kConsumerRegisters<S::kConsumers>>();
    Consumer<T, kDimQk, kDimV> consumer{args.paged, shared, base, role - 1};
    if (role == S::kConsumers) consumer.pass_turn();
    unsigned count = 0;
    for (int round = 0;; ++round) {
      const Work work = find_work<S::kRows>(args.paged, round);
      if (work.num_rows == 0) break;
      count += unsigned(consumer.run(work, count));
    }
    if (role == 1) consumer.wait_turn();  // the last one that was passed
  }
#endif
}

template <class T, int kDimQk, int kDimV>
void launch(const PrefillArgs& args, const Stream& stream) {
  using S = Shape<kDimQk, kDimV>;
  device::allow_shared_bytes<prefill_wgmma_kernel<T, kDimQk, kDimV>>(S::kBytes, stream.device);
  const PagedArgs& paged = args.paged;
  const std::int64_t group = paged.group;
  const std::int64_t longest = (paged.max_seqlen_q * group + S::kRows - 1) / S::kRows;
  const std::int64_t row_tiles =
      std::min(paged.num_tokens * group / S::kRows + paged.num_reqs, longest * paged.num_reqs);
  const std::int64_t ctas =
      std::min<std::int64_t>(row_tiles * paged.num_kv_heads, device::current_traits().num_sms);
  device::launch(prefill_wgmma_kernel<T, kDimQk, kDimV>, dim3(unsigned(ctas)), dim3(S::kThreads),
                 S::kBytes, static_cast<cudaStream_t>(stream.handle), args);
}

// Call fn with the smallest shape that holds the head sizes, as (kDimQk, kDimV) of Shape<...>.
template <class Fn>
auto dispatch_shape(const PagedArgs& args, Fn&& fn) {
  if (args.head_dim_qk <= 64) return fn(Shape<64, 64>{});
  if (args.head_dim_qk <= 128) return fn(Shape<128, 128>{});
  if (args.head_dim_qk <= 192 && args.head_dim_v <= 128) return fn(Shape<192, 128>{});
  return fn(Shape<256, 256>{});
}

int box_rows(const PagedArgs& args) {
  return dispatch_shape(
      args, [&](auto shape) { return rows_of_a_box(args.block_size, decltype(shape)::kKeys); });
}

template <class T, int kDimQk, int kDimV>
void launch_shape(Shape<kDimQk, kDimV> /*shape*/, const PrefillArgs& args, const Stream& stream) {
  launch<T, kDimQk, kDimV>(args, stream);
}

}  // namespace

bool has_wgmma_prefill(const PagedArgs& args) {
  return device::hopper_traits().has_wgmma && args.num_blocks > 0 && box_rows(args) > 0 &&
         args.slot_stride > 0 && args.kv_head_stride > 0 && args.value_offset > 0 &&
         args.block_stride > 0;
}

void launch_prefill_wgmma(const PagedArgs& args, DType dtype, const Stream& stream) {
  PrefillArgs prefill{};
  prefill.paged = args;
  prefill.box_rows = box_rows(args);
  prefill.kv = device::tensor_map(
      args.kv, dtype == DType::kF16,
      {args.head_dim_qk, args.block_size, args.num_kv_heads, 2, args.num_blocks},
      {2 * args.slot_stride, 2 * args.kv_head_stride, 2 * args.value_offset, 2 * args.block_stride},
      prefill.box_rows);
  dispatch_shape(args, [&](auto shape) {
    if (dtype == DType::kF16) return launch_shape<__half>(shape, prefill, stream);
    launch_shape<__nv_bfloat16>(shape, prefill, stream);
  });
}

}  // namespace fastgpt::attention
