#include "fastgpt/arena.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>

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

static_assert(memory::kGranule == kArenaAlignment);

namespace {

constexpr std::size_t kMaxBlockBytes = std::size_t{1} << 46;

std::size_t round_up(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

std::size_t block_size(std::size_t requested) {
  FASTGPT_CHECK(requested <= kMaxBlockBytes, "bytes is ", requested, "; a block has at most ",
                kMaxBlockBytes);
  return round_up(std::max<std::size_t>(requested, 1), kArenaAlignment);
}

std::size_t overlap(const std::byte* a, const std::byte* a_end, const std::byte* b,
                    const std::byte* b_end) {
  const std::byte* begin = std::max(a, b);
  const std::byte* end = std::min(a_end, b_end);
  return begin < end ? std::size_t(end - begin) : 0;
}

}  // namespace

// Locks, in the order they are taken: grow, a lane's, mutex, a shard's of the block map. `mutex`
// guards blocks, fences and counters and is never held during a call that maps memory; `grow` is
// held by the one who changes physical memory.
struct Arena::Impl {
  Impl(std::shared_ptr<Upstream> upstream_in, std::size_t budget_bytes, ArenaOptions options_in)
      : upstream(std::move(upstream_in)),
        options(options_in),
        backing(upstream, budget_bytes, options.handle_bytes),
        order(upstream) {
    if (backing.can_map()) {
      const Range all = backing.reservation();
      heap.add_slab(all.begin, std::size_t(all.end - all.begin));
      high_water = all.begin;
      if (options.ahead_bytes > 0) ahead_thread = std::thread([this] { commit_ahead(); });
    }
  }

  ~Impl() {
    if (ahead_thread.joinable()) {
      {
        std::lock_guard lock(mutex);
        stop = true;
      }
      ahead_wanted.notify_one();
      ahead_thread.join();
    }
    upstream->synchronize_device();
  }

  // -- the fast path ------------------------------------------------------------------------------

  void* allocate(std::size_t requested, void* stream) {
    const std::size_t bytes = block_size(requested);
    if (options.use_lanes && bytes <= Lanes::kMaxBlockBytes) {
      if (Block* block = lanes.pop(stream, bytes, requested)) return block->data;
    }
    {
      std::lock_guard lock(mutex);
      if (Block* block = heap.find(bytes)) return hand_out(block, bytes, requested, stream);
    }
    std::lock_guard grow_lock(grow);
    for (bool flushed = false;;) {
      {
        std::lock_guard lock(mutex);
        if (Block* block = heap.find_thoroughly(bytes)) {
          return hand_out(block, bytes, requested, stream);
        }
      }
      if (commit_for(bytes)) continue;
      if (!flushed && flush_lanes(nullptr)) {
        flushed = true;
        continue;
      }
      fail_out_of_memory(requested);
    }
  }

  void* hand_out(Block* block, std::size_t bytes, std::size_t requested, void* stream) {
    if (!order.wait(block->fence(), stream)) {
      detail::fail<DeviceError>(
          __FILE__, __LINE__, bytes,
          " bytes that another stream used would be reused by a stream that is being captured "
          "into a graph; allocate before the capture");
    }
    heap.take(block, bytes, requested);
    map.insert(block);
    out_bytes += bytes;
    allocated += std::int64_t(bytes);
    live_requested += std::int64_t(requested);
    ++num_blocks;
    ++num_allocations;
    note_use(block);
    return block->data;
  }

  void free(void* data, void* stream) {
    std::uint32_t others = 0;
    Block* block = map.with(data, [&](Block* found) {
      check_live(found, data);
      found->set(State::kLane);
      others = found->streams;
      return found;
    });
    if (options.use_lanes && others == 0 && block->bytes <= Lanes::kMaxBlockBytes &&
        lanes.push(stream, block, [&](Block* extra) { take_from_lane(extra, stream); })) {
      return;
    }
    std::lock_guard lock(mutex);
    Fence fence;
    try {
      fence = order.free(stream, others);
    } catch (...) {
      block->set(State::kLive);
      throw;
    }
    live_requested -= std::int64_t(block->requested);
    allocated -= std::int64_t(block->bytes);
    --num_blocks;
    give_back(block, fence);
  }

  void give_back(Block* block, Fence fence) {
    map.erase(block);
    out_bytes -= block->bytes;
    heap.release(block, fence);
  }

  static void check_live(const Block* block, const void* data) {
    FASTGPT_CHECK(block == nullptr || !block->is(State::kEvicted), "pointer ", data,
                  " is evicted; restore it first");
    FASTGPT_CHECK(block != nullptr && block->is(State::kLive), "pointer ", data,
                  " is not a live block of this arena; was it freed before?");
  }

  // The block that starts at `data`, live. Its owner is the caller, so it stays live.
  Block* find_live(const void* data) {
    return map.with(data, [&](Block* found) {
      check_live(found, data);
      return found;
    });
  }

  void note_use(const Block* block) {
    if (block->end() > high_water) {
      high_water = block->end();
      note_reserved();
      if (options.ahead_bytes > 0 && ahead() < options.ahead_bytes) ahead_wanted.notify_one();
    }
    // What lanes have not published yet may be less than nothing: never more than is out.
    peak_requested = std::max(
        peak_requested, std::min(live_requested + lanes.published(), std::int64_t(out_bytes)));
    peak_allocated = std::max(peak_allocated, out_bytes);
  }

  void note_reserved() {
    peak_reserved = std::max(peak_reserved, backing.committed_bytes());
    peak_touched = std::max(peak_touched, backing.committed_bytes() - ahead());
  }

  // Bytes at the committed end that were never handed out.
  std::size_t ahead() const {
    return backing.can_map() ? committed(high_water, backing.reservation().end) : 0;
  }

  // Bytes of physical memory in [begin, end).
  std::size_t committed(const std::byte* begin, const std::byte* end) const {
    std::size_t bytes = 0;
    const auto& handles = backing.handles();
    auto handle = handles.lower_bound(const_cast<std::byte*>(end));
    while (handle != handles.begin()) {
      --handle;
      const std::byte* handle_end = handle->first + handle->second.bytes;
      if (handle_end <= begin) break;
      bytes += overlap(begin, end, handle->first, handle_end);
    }
    return bytes;
  }

  bool flush_lanes(void* const* only) {
    bool any = false;
    lanes.flush(
        [&](Block* block, void* stream) {
          take_from_lane(block, stream);
          any = true;
        },
        only);
    return any;
  }

  void take_from_lane(Block* block, void* stream) {
    std::lock_guard lock(mutex);
    give_back(block, order.free(stream, 0));
  }

  [[noreturn]] void fail_out_of_memory(std::size_t requested) {
    std::lock_guard lock(mutex);
    detail::fail<OutOfMemory>(__FILE__, __LINE__, requested, " bytes were asked for; ", out_bytes,
                              " of a budget of ", backing.budget_bytes(), " bytes are allocated, ",
                              backing.committed_bytes(), " reserved, and the device has ",
                              upstream->free_bytes(), " bytes free");
  }

  // -- physical memory: the grow lock is held ----------------------------------------------------

  // Where committing the fewest bytes makes a free run of `bytes`; begin == end if nowhere.
  Range cheapest_run(std::size_t bytes) const {
    Range best{nullptr, nullptr};
    std::size_t best_cost = ~std::size_t{0};
    for (const auto& [base, block] : heap.voids()) {
      const auto free_bytes = [](const Block* b) {
        return b != nullptr && b->is(State::kFree) ? b->bytes : 0;
      };
      const std::size_t before = free_bytes(block->prev);
      const std::size_t need = bytes - std::min(before, bytes - 1);
      Range run{block->data, block->end()};
      if (need <= block->bytes) {
        run.end = run.begin + need;
      } else if (before + block->bytes + free_bytes(block->next) < bytes) {
        continue;
      }
      run = backing.widen(run);
      std::size_t cost = 0;
      for (const Range& gap : backing.gaps(run)) cost += gap.bytes();
      if (cost < best_cost) {
        best = run;
        best_cost = cost;
      }
    }
    return best;
  }

  // Add physical memory so that a block of `bytes` may fit. @return false when budget and device
  // have none.
  bool commit_for(std::size_t bytes) {
    if (!backing.can_map()) return commit_slab(bytes);
    Range run;
    for (;;) {
      std::size_t cost = 0;
      {
        std::lock_guard lock(mutex);
        run = cheapest_run(bytes);
        if (run.begin == run.end) return false;
        for (const Range& gap : backing.gaps(run)) cost += gap.bytes();
      }
      if (cost <= backing.room_bytes()) break;
      // Not the free memory beside the run, as long as there is other.
      const std::size_t missing = cost - backing.room_bytes();
      if (reclaim(missing, {run.begin - bytes, run.end + bytes}) == 0 && reclaim(missing) == 0) {
        return false;
      }
    }
    // A small request commits a whole handle: the next ones find memory without the driver.
    Range wide = run;
    if (run.bytes() < backing.handle_bytes()) {
      std::lock_guard lock(mutex);
      const std::size_t room = std::min(backing.handle_bytes(), backing.room_bytes());
      std::byte* const limit = backing.widen({run.begin, void_end(run.begin, run.end)}).end;
      wide.end = std::max(run.end, std::min(run.begin + room, limit));
    }
    if (commit_range(wide)) return true;
    if (wide.end != run.end && commit_range(run)) return true;  // the device is nearly full
    return reclaim(~std::size_t{0}) > 0;                        // then plan again
  }

  // The end of the void block that contains the last byte before `end`.
  std::byte* void_end(const std::byte* begin, std::byte* end) const {
    auto it = heap.voids().lower_bound(end);
    if (it == heap.voids().begin()) return end;
    const Block* block = std::prev(it)->second;
    return block->end() > begin ? std::max(end, block->end()) : end;
  }

  bool commit_range(Range run) {
    const auto gaps = backing.gaps(run);
    const auto mapped = backing.map(gaps);
    if (!mapped) return false;
    std::lock_guard lock(mutex);
    backing.add(*mapped);
    for (const Range& gap : gaps) heap.commit(gap.begin, gap.end);
    note_reserved();
    return true;
  }

  bool commit_slab(std::size_t bytes) {
    bytes = round_up(bytes, backing.granularity());
    if (bytes > backing.room_bytes()) reclaim(bytes - backing.room_bytes());
    if (bytes > backing.room_bytes()) return false;
    auto slab = backing.allocate_slab(
        std::min(std::max(bytes, backing.handle_bytes()), backing.room_bytes()));
    if (!slab) {
      reclaim(~std::size_t{0});
      slab = backing.allocate_slab(bytes);
    }
    if (!slab) return false;
    std::lock_guard lock(mutex);
    backing.add({*slab});
    heap.add_slab(slab->address, slab->handle.bytes);
    heap.commit(slab->address, slab->address + slab->handle.bytes);
    note_reserved();
    return true;
  }

  // Handles in which nothing is live, highest address first, with a free block in each.
  // Evicted blocks may share them.
  struct Vacant {
    Backing::Mapped mapped;
    Block* block;
    Fence fence;
  };
  std::vector<Vacant> vacant_handles() const {
    std::vector<Vacant> vacant;
    auto slab = heap.slabs().begin();
    Block* block = slab == heap.slabs().end() ? nullptr : slab->second;
    for (const auto& [address, handle] : backing.handles()) {
      const std::byte* end = address + handle.bytes;
      const auto next = [&] {
        block = block->next;
        if (block == nullptr && ++slab != heap.slabs().end()) block = slab->second;
      };
      while (block->end() <= address || block->data > end) next();
      bool is_vacant = true;
      Fence fence;
      for (const Block* b = block; b != nullptr && b->data < end; b = b->next) {
        is_vacant &= b->is(State::kFree) || b->is(State::kEvicted) || b->is(State::kVoid);
        if (b->is(State::kFree)) {
          fence.streams |= b->streams;
          fence.tick = std::max(fence.tick, b->tick);
        }
      }
      if (is_vacant) vacant.push_back({{address, handle}, block, fence});
    }
    std::reverse(vacant.begin(), vacant.end());
    return vacant;
  }

  // Give back vacant handles until `wanted` bytes are returned, none of those in `keep`. First
  // those whose fence is over: the host has to wait for the others.
  std::size_t reclaim(std::size_t wanted, Range keep = {nullptr, nullptr}) {
    std::size_t returned = 0;
    for (const bool may_wait : {false, true}) {
      std::vector<Backing::Mapped> chosen;
      {
        std::lock_guard lock(mutex);
        if (!may_wait) order.poll();
        for (const Vacant& vacant : vacant_handles()) {
          const auto [address, handle] = vacant.mapped;
          if (returned >= wanted) break;
          if (overlap(address, address + handle.bytes, keep.begin, keep.end) > 0) continue;
          if (withdraw(vacant, may_wait)) {
            returned += handle.bytes;
            chosen.push_back(vacant.mapped);
          }
        }
      }
      for (const Backing::Mapped& mapped : chosen) {
        if (!return_handle(mapped)) returned -= mapped.handle.bytes;
      }
    }
    return returned;
  }

  // Nobody is given memory of this handle from now on.
  bool withdraw(const Vacant& vacant, bool may_wait) {
    const bool is_over = may_wait ? order.wait_on_host(vacant.fence) : order.is_over(vacant.fence);
    if (!is_over) return false;
    const auto [address, handle] = vacant.mapped;
    heap.decommit(vacant.block, address, address + handle.bytes);
    if (address + handle.bytes >= high_water) high_water = std::min(high_water, address);
    return true;
  }

  bool return_handle(const Backing::Mapped& mapped) {
    const bool done = backing.unmap(mapped);
    std::lock_guard lock(mutex);
    if (done) {
      backing.remove(mapped);
      device_is_full = false;
      if (!backing.can_map()) heap.remove_slab(heap.slabs().at(mapped.address));
    } else {
      heap.commit(mapped.address, mapped.address + mapped.handle.bytes);
    }
    return done;
  }

  // -- a thread that keeps memory committed ahead of need
  // ------------------------------------------

  void commit_ahead() {
    std::unique_lock lock(mutex);
    while (!stop) {
      const bool wanted = ahead() < options.ahead_bytes &&
                          high_water != backing.reservation().begin &&
                          backing.room_bytes() >= backing.handle_bytes() && !device_is_full;
      if (!wanted) {
        ahead_wanted.wait(lock);
        continue;
      }
      lock.unlock();
      {
        std::lock_guard grow_lock(grow);
        Range run{nullptr, nullptr};
        {
          std::lock_guard inner(mutex);
          const auto& [base, tail] = *heap.voids().rbegin();
          if (backing.room_bytes() >= backing.handle_bytes() &&
              tail->bytes >= backing.handle_bytes()) {
            run = {base, base + backing.handle_bytes()};
          }
        }
        try {
          if (run.begin == nullptr || !commit_range(backing.widen(run))) device_is_full = true;
        } catch (const std::exception&) {
          device_is_full = true;  // the foreground will meet the same error and report it
        }
      }
      lock.lock();
    }
  }

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

  std::condition_variable ahead_wanted;
  bool stop = false;
  std::atomic<bool> device_is_full{false};
  std::thread ahead_thread;
  const pid_t pid = getpid();

  // -- eviction: the grow lock is held ------------------------------------------------------------

  void count_live(const Block* block, int sign) {
    live_requested += sign * std::int64_t(block->requested);
    allocated += sign * std::int64_t(block->bytes);
    out_bytes += std::size_t(sign) * block->bytes;
    num_blocks += sign;
  }

  void evict(Block* block) {
    std::vector<Backing::Mapped> chosen;
    {
      std::lock_guard lock(mutex);
      block->set(State::kEvicted);
      count_live(block, -1);
      for (const Vacant& vacant : vacant_handles()) {
        const auto [address, handle] = vacant.mapped;
        if (overlap(block->data, block->end(), address, address + handle.bytes) > 0 &&
            withdraw(vacant, true)) {
          chosen.push_back(vacant.mapped);
        }
      }
    }
    for (const Backing::Mapped& mapped : chosen) return_handle(mapped);
  }

  void restore(Block* block) {
    const Range all = backing.widen({block->data, block->end()});
    const auto cost = [&] {
      std::size_t bytes = 0;
      for (const Range& gap : backing.gaps(all)) bytes += gap.bytes();
      return bytes;
    };
    bool done = false;
    while (!done) {
      const std::size_t bytes = cost();
      const bool has_room = bytes <= backing.room_bytes();
      done = has_room && commit_range(all);
      const std::size_t missing = has_room ? ~std::size_t{0} : bytes - backing.room_bytes();
      if (!done && reclaim(missing, all) == 0 && !flush_lanes(nullptr)) {
        fail_out_of_memory(block->requested);
      }
    }
    std::lock_guard lock(mutex);
    block->set(State::kLive);
    count_live(block, 1);
    note_use(block);
  }

  // The address of an evicted block is given up; what is committed under it becomes free.
  void drop_evicted(Block* block) {
    std::lock_guard lock(mutex);
    const Range all{block->data, block->end()};
    map.erase(block);
    heap.make_void(block);
    std::byte* at = all.begin;
    for (const Range& gap : backing.gaps(all)) {
      if (at < gap.begin) heap.commit(at, gap.begin);
      at = gap.end;
    }
    if (at < all.end) heap.commit(at, all.end);
  }

  // -- reports: `mutex` and all lanes are locked --------------------------------------------------

  ArenaStats count() const {
    const Lanes::Counts kept = lanes.counts();
    ArenaStats s;
    s.budget_bytes = backing.budget_bytes();
    s.reserved_bytes = backing.committed_bytes();
    s.allocated_bytes = std::size_t(allocated + kept.allocated);
    s.requested_bytes = std::size_t(live_requested + kept.requested);
    s.rounding_bytes = s.allocated_bytes - s.requested_bytes;
    s.lane_bytes = out_bytes - s.allocated_bytes;
    for (const auto& [base, first] : heap.slabs()) {
      for (const Block* block = first; block != nullptr; block = block->next) {
        if (block->is(State::kEvicted)) s.evicted_bytes += committed(block->data, block->end());
        if (!block->is(State::kFree)) continue;
        if (!order.is_over(block->fence())) {
          s.pending_bytes += block->bytes;
          continue;
        }
        std::size_t whole = 0;
        for (auto handle = backing.handles().lower_bound(block->data);
             handle != backing.handles().end() &&
             handle->first + handle->second.bytes <= block->end();
             ++handle) {
          whole += handle->second.bytes;
        }
        s.returnable_bytes += whole;
        s.scattered_bytes += block->bytes - whole;
      }
    }
    s.ahead_bytes = ahead();
    s.largest_free_bytes = heap.largest_free_bytes();
    s.peak_requested_bytes = std::max(std::size_t(peak_requested), s.requested_bytes);
    s.peak_allocated_bytes = peak_allocated;
    s.peak_reserved_bytes = peak_reserved;
    s.peak_touched_bytes = peak_touched;
    s.num_slabs = backing.handles().size();
    s.num_blocks = std::size_t(num_blocks + kept.blocks);
    s.num_allocations = num_allocations + kept.allocations;
    s.num_upstream_calls = backing.num_calls();
    s.num_stream_waits = order.num_waits();
    s.num_event_records = order.num_records();
    return s;
  }

  std::vector<SegmentInfo> snapshot() const {
    std::vector<SegmentInfo> segments;
    const std::byte* end = nullptr;
    const auto add = [&](std::byte* begin, std::size_t bytes, const Block* block) {
      if (segments.empty() || begin != end) {
        segments.push_back({reinterpret_cast<std::uintptr_t>(begin), 0, {}});
      }
      BlockInfo info{reinterpret_cast<std::uintptr_t>(begin), bytes, 0, BlockInfo::Kind::kFree};
      if (block->is(State::kLive)) info.kind = BlockInfo::Kind::kLive;
      if (block->is(State::kLane)) info.kind = BlockInfo::Kind::kLane;
      if (block->is(State::kEvicted)) info.kind = BlockInfo::Kind::kEvicted;
      if (block->is(State::kLive)) info.requested_bytes = block->requested;
      if (block->is(State::kFree) && !order.is_over(block->fence())) {
        info.kind = BlockInfo::Kind::kPending;
      }
      segments.back().bytes += bytes;
      segments.back().blocks.push_back(info);
      end = begin + bytes;
    };
    for (const auto& [base, first] : heap.slabs()) {
      end = nullptr;  // slabs may touch by chance; they stay apart
      for (const Block* block = first; block != nullptr; block = block->next) {
        if (block->is(State::kVoid)) continue;
        if (!block->is(State::kEvicted)) {
          add(block->data, block->bytes, block);
          continue;
        }
        std::byte* at = block->data;
        for (const Range& gap : backing.gaps({block->data, block->end()})) {
          if (at < gap.begin) add(at, std::size_t(gap.begin - at), block);
          at = gap.end;
        }
        if (at < block->end()) add(at, std::size_t(block->end() - at), block);
      }
    }
    return segments;
  }

  void check_integrity() const {
    const auto require = [](bool holds, const char* what) {
      if (!holds) detail::fail<Error>(__FILE__, __LINE__, "arena invariant broken: ", what);
    };
    heap.check_integrity();
    std::size_t out = 0;
    std::size_t live = 0;
    std::size_t requested = 0;
    std::size_t live_bytes = 0;
    std::size_t in_lanes = 0;
    for (const auto& [base, first] : heap.slabs()) {
      for (const Block* block = first; block != nullptr; block = block->next) {
        const std::size_t under = committed(block->data, block->end());
        if (block->is(State::kVoid)) {
          require(under == 0, "void blocks have no physical memory");
        } else if (!block->is(State::kEvicted)) {
          require(under == block->bytes, "blocks lie on physical memory");
        }
        if (block->is(State::kLane)) in_lanes += block->bytes;
        if (block->is(State::kLane) || block->is(State::kLive)) out += block->bytes;
        if (!block->is(State::kLive)) continue;
        require(block->requested <= block->bytes, "a block holds what was asked for");
        live_bytes += block->bytes;
        requested += block->requested;
        ++live;
      }
    }
    const ArenaStats s = count();
    require(out == out_bytes, "out_bytes counts what is not in the heap");
    require(live_bytes == s.allocated_bytes, "allocated_bytes counts live blocks");
    require(requested == s.requested_bytes, "requested_bytes counts live requests");
    require(live == s.num_blocks, "num_blocks counts live blocks");
    require(in_lanes == s.lane_bytes && in_lanes == lanes.counts().kept,
            "lanes count their blocks");
    std::size_t handles = 0;
    for (const auto& [address, handle] : backing.handles()) handles += handle.bytes;
    require(handles == s.reserved_bytes, "reserved_bytes counts handles");
    require(s.reserved_bytes == s.requested_bytes + s.rounding_bytes + s.pending_bytes +
                                    s.returnable_bytes + s.scattered_bytes + s.lane_bytes +
                                    s.evicted_bytes,
            "reserved = requested + rounding + pending + returnable + scattered + lane + evicted");
    require(s.reserved_bytes <= s.budget_bytes, "reserved <= budget");
    require(s.peak_requested_bytes <= s.peak_reserved_bytes, "peaks are ordered");
  }
};

Arena::Arena(std::shared_ptr<Upstream> upstream, std::size_t budget_bytes, ArenaOptions options)
    : upstream_(std::move(upstream)),
      impl_(std::make_unique<Impl>(upstream_, budget_bytes, options)) {}

// A forked child has neither the arena's thread nor the device: it leaves everything as it is.
Arena::~Arena() {
  if (impl_->pid != getpid()) (void)impl_.release();
}

void* Arena::allocate(std::size_t bytes, void* stream) { return impl_->allocate(bytes, stream); }

void Arena::free(void* data, void* stream) {
  const bool is_evicted = impl_->map.with(
      data, [](Block* block) { return block != nullptr && block->is(State::kEvicted); });
  if (!is_evicted) return impl_->free(data, stream);
  std::lock_guard grow_lock(impl_->grow);
  impl_->drop_evicted(impl_->map.with(data, [](Block* block) { return block; }));
}

void Arena::record_use(void* data, void* stream) {
  std::lock_guard lock(impl_->mutex);
  const std::uint32_t bit = impl_->order.use(stream);
  impl_->map.with(data, [&](Block* block) {
    Impl::check_live(block, data);
    block->streams |= bit;
  });
}

void Arena::release_stream(void* stream) {
  impl_->flush_lanes(&stream);
  std::lock_guard lock(impl_->mutex);
  impl_->order.release(stream);
}

bool Arena::grow(void* data, std::size_t requested, void* stream) {
  const std::size_t bytes = block_size(requested);
  std::lock_guard lock(impl_->mutex);
  Block* block = impl_->find_live(data);
  impl_->count_live(block, -1);
  bool fits = bytes <= block->bytes;
  if (const Block* next = block->next;
      !fits && next != nullptr && next->is(State::kFree) && block->bytes + next->bytes >= bytes) {
    fits = impl_->order.wait(next->fence(), stream);
    if (fits) impl_->heap.extend(block, bytes);
  }
  if (fits) block->requested = requested;
  impl_->count_live(block, 1);
  impl_->note_use(block);
  return fits;
}

std::size_t Arena::trim() {
  std::lock_guard grow_lock(impl_->grow);
  impl_->flush_lanes(nullptr);
  return impl_->reclaim(~std::size_t{0});
}

bool Arena::can_evict() const { return impl_->backing.can_map(); }

void Arena::evict(void* data) {
  FASTGPT_CHECK(can_evict(), "this device's memory comes in fixed slabs; nothing can be evicted");
  std::lock_guard grow_lock(impl_->grow);
  impl_->evict(impl_->find_live(data));
}

void Arena::restore(void* data) {
  std::lock_guard grow_lock(impl_->grow);
  Block* block = impl_->map.with(data, [](Block* found) { return found; });
  FASTGPT_CHECK(block != nullptr && block->is(State::kEvicted), "pointer ", data,
                " is not an evicted block of this arena");
  impl_->restore(block);
}

std::size_t Arena::block_bytes(const void* data) const {
  std::lock_guard lock(impl_->mutex);
  return impl_->find_live(data)->bytes;
}

ArenaStats Arena::stats() const {
  const auto lanes = impl_->lanes.lock_all();
  std::lock_guard lock(impl_->mutex);
  impl_->order.poll();
  return impl_->count();
}

std::vector<SegmentInfo> Arena::snapshot() const {
  const auto lanes = impl_->lanes.lock_all();
  std::lock_guard lock(impl_->mutex);
  impl_->order.poll();
  return impl_->snapshot();
}

void Arena::reset_peaks() {
  const auto lanes = impl_->lanes.lock_all();
  std::lock_guard lock(impl_->mutex);
  const ArenaStats stats = impl_->count();
  impl_->peak_requested = std::int64_t(stats.requested_bytes);
  impl_->peak_allocated = impl_->out_bytes;
  impl_->peak_reserved = stats.reserved_bytes;
  impl_->peak_touched = stats.reserved_bytes - stats.ahead_bytes;
}

void Arena::check_integrity() const {
  const auto lanes = impl_->lanes.lock_all();
  std::lock_guard lock(impl_->mutex);
  impl_->check_integrity();
}

}  // namespace fastgpt
