#include <algorithm>
#include <exception>

#include "memory/arena_impl.h"

namespace fastgpt {
namespace {

std::size_t round_up(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

// Where committing the fewest bytes makes a free run of `bytes`; begin == end if nowhere.
Range Arena::Impl::cheapest_run(std::size_t bytes) const {
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
bool Arena::Impl::commit_for(std::size_t bytes) {
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
std::byte* Arena::Impl::void_end(const std::byte* begin, std::byte* end) const {
  auto it = heap.voids().lower_bound(end);
  if (it == heap.voids().begin()) return end;
  const Block* block = std::prev(it)->second;
  return block->end() > begin ? std::max(end, block->end()) : end;
}

bool Arena::Impl::commit_range(Range run) {
  const Backing::Commit commit = backing.map(backing.gaps(run));
  {
    std::lock_guard lock(mutex);
    backing.add(commit.mapped);
    for (const auto& [address, handle] : commit.mapped) {
      heap.commit(address, address + handle.bytes);
    }
    if (commit.is_done) device_is_full = false;
    note_reserved();
  }
  if (commit.error != nullptr) std::rethrow_exception(commit.error);
  return commit.is_done;
}

bool Arena::Impl::commit_slab(std::size_t bytes) {
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

// The handle, if nothing in it is live; `first` is the block in which it begins.
std::optional<Arena::Impl::Vacant> Arena::Impl::vacant(const Backing::Mapped& mapped,
                                                       Block* first) const {
  const std::byte* end = mapped.address + mapped.handle.bytes;
  bool is_vacant = true;
  Fence fence;
  for (const Block* b = first; b != nullptr && b->data < end; b = b->next) {
    is_vacant &= b->is(State::kFree) || b->is(State::kEvicted) || b->is(State::kVoid);
    if (b->is(State::kFree)) {
      fence.streams |= b->streams;
      fence.tick = std::max(fence.tick, b->tick);
    }
  }
  if (!is_vacant) return std::nullopt;
  return Vacant{mapped, first, fence};
}

std::vector<Arena::Impl::Vacant> Arena::Impl::vacant_handles() const {
  std::vector<Vacant> found;
  auto slab = heap.slabs().begin();
  Block* block = slab == heap.slabs().end() ? nullptr : slab->second;
  for (const auto& [address, handle] : backing.handles()) {
    const auto next = [&] {
      block = block->next;
      if (block == nullptr && ++slab != heap.slabs().end()) block = slab->second;
    };
    while (block->end() <= address || block->data > address + handle.bytes) next();
    if (const auto one = vacant({address, handle}, block)) found.push_back(*one);
  }
  std::reverse(found.begin(), found.end());
  return found;
}

// Those that share bytes with one block, the last first like above.
std::vector<Arena::Impl::Vacant> Arena::Impl::vacant_handles(Block* under) const {
  std::vector<Vacant> found;
  auto at = backing.handles().lower_bound(under->end());
  while (at != backing.handles().begin()) {
    const auto& [address, handle] = *--at;
    if (address + handle.bytes <= under->data) break;
    Block* first = under;
    while (first->prev != nullptr && first->data > address) first = first->prev;
    if (const auto one = vacant({address, handle}, first)) found.push_back(*one);
  }
  return found;
}

// Give back vacant handles until `wanted` bytes are returned, none of those in `keep`. First those
// whose fence is over: the host has to wait for the others. No handle is withdrawn before every
// wait is over, so a wait that fails leaves them all.
std::size_t Arena::Impl::reclaim(std::size_t wanted, Range keep) {
  std::size_t returned = 0;
  for (const bool may_wait : {false, true}) {
    std::vector<Vacant> chosen;
    {
      std::lock_guard lock(mutex);
      if (!may_wait) order.poll();
      std::size_t found = returned;
      for (const Vacant& vacant : vacant_handles()) {
        const auto [address, handle] = vacant.mapped;
        if (found >= wanted) break;
        if (overlap(address, address + handle.bytes, keep.begin, keep.end) > 0) continue;
        if (may_wait ? !order.wait_on_host(vacant.fence) : !order.is_over(vacant.fence)) continue;
        found += handle.bytes;
        chosen.push_back(vacant);
      }
      for (const Vacant& vacant : chosen) withdraw(vacant);
    }
    for (const Vacant& vacant : chosen) {
      if (return_handle(vacant.mapped)) returned += vacant.mapped.handle.bytes;
    }
  }
  return returned;
}

// Nobody is given memory of this handle from now on. Its fence is over.
void Arena::Impl::withdraw(const Vacant& vacant) {
  const auto [address, handle] = vacant.mapped;
  heap.decommit(vacant.block, address, address + handle.bytes);
  if (address + handle.bytes >= high_water) high_water = std::min(high_water, address);
}

bool Arena::Impl::return_handle(const Backing::Mapped& mapped) {
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

void Arena::Impl::commit_ahead() {
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

// A handle that a stream is still using beside the block, and that cannot be waited for, stays.
void Arena::Impl::evict(Block* block) {
  std::vector<Vacant> chosen;
  {
    std::lock_guard lock(mutex);
    block->set(State::kEvicted);
    count_live(block, -1);
    for (const Vacant& one : vacant_handles(block)) {
      try {
        if (order.wait_on_host(one.fence)) chosen.push_back(one);
      } catch (const DeviceError&) {
      }
    }
    for (const Vacant& vacant : chosen) withdraw(vacant);
  }
  for (const Vacant& vacant : chosen) return_handle(vacant.mapped);
}

void Arena::Impl::restore(Block* block) {
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
void Arena::Impl::drop_evicted(Block* block) {
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

}  // namespace fastgpt
