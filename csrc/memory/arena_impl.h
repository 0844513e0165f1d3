// What an arena is made of. arena.cpp: blocks in and out; arena_physical.cpp: the memory under
// them; arena_report.cpp: counts, snapshots and invariants.
#pragma once
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "fastgpt/arena.h"
#include "fastgpt/check.h"
#include "memory/backing.h"
#include "memory/block_map.h"
#include "memory/heap.h"
#include "memory/lanes.h"
#include "memory/stream_order.h"

namespace fastgpt {

using memory::Backing;
using memory::Block;
using memory::BlockMap;
using memory::Fence;
using memory::Heap;
using memory::Lanes;
using memory::Range;
using memory::State;
using memory::StreamOrder;

// Locks, in the order they are taken: grow, a lane's, mutex, a shard's of the block map. `mutex`
// guards blocks, fences and counters and is never held during a call that maps memory; `grow` is
// held by the one who changes physical memory.
//
// Strong guarantee: what calls the driver comes first, what changes the books after it.
struct Arena::Impl {
  Impl(std::shared_ptr<Upstream> upstream, std::size_t budget_bytes, ArenaOptions options);
  ~Impl();

  // -- blocks: arena.cpp -------------------------------------------------------------------------

  void* allocate(std::size_t requested, void* stream);
  /// @param stream the last to use the block; null pointer: streams that record_use named, alone.
  void free(void* data, void* const* stream);
  bool extend(void* data, std::size_t requested, void* stream);
  /// The block that starts at `data`, live. Its owner is the caller, so it stays live.
  Block* find_live(const void* data);
  static void check_live(const Block* block, const void* data) {
    FASTGPT_CHECK(block == nullptr || !block->is(State::kEvicted), "pointer ", data,
                  " is evicted; restore it first");
    FASTGPT_CHECK(block != nullptr && block->is(State::kLive), "pointer ", data,
                  " is not a live block of this arena; was it freed before?");
  }
  bool flush_lanes(void* const* only);

  Block* spare_ahead(Block* block, std::size_t bytes);
  void* hand_out(Block* block, std::size_t bytes, std::size_t requested, void* stream);
  void take_back(Block* block, void* const* stream, std::uint32_t others);
  void take_from_lane(Block* block, void* stream);
  void count_live(const Block* block, int sign);
  void note_use(const Block* block);
  void note_reserved();
  [[noreturn]] void fail_out_of_memory(std::size_t requested);

  // -- physical memory, the grow lock is held: arena_physical.cpp
  // ----------------------------------

  /// A handle in which nothing is live, though evicted blocks may share it, and a free or void
  /// block that reaches into it.
  struct Vacant {
    Backing::Mapped mapped;
    Block* block;
    Fence fence;
  };

  bool commit_for(std::size_t bytes);
  std::size_t reclaim(std::size_t wanted, Range keep = {nullptr, nullptr});
  void evict(Block* block);
  void restore(Block* block);
  void drop_evicted(Block* block);

  Range cheapest_run(std::size_t bytes) const;
  std::byte* void_end(const std::byte* begin, std::byte* end) const;
  bool commit_range(Range run);
  bool commit_slab(std::size_t bytes);
  std::optional<Vacant> vacant(const Backing::Mapped& mapped, Block* first) const;
  std::vector<Vacant> vacant_handles() const;
  std::vector<Vacant> vacant_handles(Block* under) const;
  void withdraw(const Vacant& vacant);
  bool return_handle(const Backing::Mapped& mapped);
  void commit_ahead();

  // -- reports, `mutex` is held: arena_report.cpp
  // ---------------------------------------------------

  std::size_t committed(const std::byte* begin, const std::byte* end) const;
  std::size_t ahead() const;
  // All lanes are locked, too.
  ArenaStats count() const;
  std::vector<SegmentInfo> snapshot() const;
  void check_integrity() const;

  const std::shared_ptr<Upstream> upstream;
  const ArenaOptions options;
  std::mutex grow;
  mutable std::mutex mutex;
  Backing backing;
  Heap heap;
  mutable StreamOrder order;
  BlockMap map;
  mutable Lanes lanes;

  // Guarded by mutex. Lanes keep the difference they make themselves.
  std::size_t out_bytes = 0;  // of blocks that are not in the heap
  std::int64_t allocated = 0;
  std::int64_t live_requested = 0;
  std::int64_t num_blocks = 0;
  std::uint64_t num_allocations = 0;
  std::byte* high_water = nullptr;
  std::int64_t peak_requested = 0;
  std::size_t peak_allocated = 0;
  std::size_t peak_reserved = 0;
  std::size_t peak_touched = 0;

  // A thread that keeps memory committed ahead of need.
  std::condition_variable ahead_wanted;
  bool stop = false;
  std::atomic<bool> device_is_full{false};
  std::thread ahead_thread;
  const pid_t pid = getpid();
};

/// Bytes that [a, a_end) and [b, b_end) share.
inline std::size_t overlap(const std::byte* a, const std::byte* a_end, const std::byte* b,
                           const std::byte* b_end) {
  const std::byte* begin = a > b ? a : b;
  const std::byte* end = a_end < b_end ? a_end : b_end;
  return begin < end ? std::size_t(end - begin) : 0;
}

}  // namespace fastgpt
