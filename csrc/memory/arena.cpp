#include "fastgpt/arena.h"

#include <algorithm>
#include <iterator>

namespace fastgpt {
namespace {

constexpr std::size_t round_up(std::size_t bytes) {
  const std::size_t least = std::max<std::size_t>(bytes, 1);
  return (least + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
}

}  // namespace

Arena::Arena(std::shared_ptr<Upstream> upstream, std::size_t budget_bytes, std::size_t slab_bytes)
    : upstream_(std::move(upstream)), slab_bytes_(round_up(slab_bytes)) {
  stats_.budget_bytes = budget_bytes / kArenaAlignment * kArenaAlignment;
}

Arena::~Arena() {
  for (auto block = blocks_.begin(); block != blocks_.end();) {
    std::byte* const slab = block->first;
    std::size_t bytes = 0;
    do {
      bytes += block->second.bytes;
      ++block;
    } while (block != blocks_.end() && !block->second.starts_slab);
    upstream_->free(slab, bytes);
  }
}

void Arena::insert_free(Blocks::iterator block) {
  block->second.is_free = true;
  by_size_.emplace(block->second.bytes, block->first);
}

void Arena::erase_free(Blocks::iterator block) {
  by_size_.erase({block->second.bytes, block->first});
  block->second.is_free = false;
}

void Arena::note_peaks() {
  stats_.peak_allocated_bytes = std::max(stats_.peak_allocated_bytes, stats_.allocated_bytes);
  stats_.peak_reserved_bytes = std::max(stats_.peak_reserved_bytes, stats_.reserved_bytes);
}

// Split the tail off a block that is out of by_size_ and account for the rest.
void Arena::take(Blocks::iterator block, std::size_t bytes, std::size_t requested, void* stream) {
  Block& head = block->second;
  if (head.bytes > bytes) {
    const auto tail = blocks_.emplace_hint(std::next(block), block->first + bytes,
                                           Block{head.bytes - bytes, 0, true, false, head.stream});
    head.bytes = bytes;
    insert_free(tail);
  }
  head.requested = requested;
  head.stream = stream;
  stats_.allocated_bytes += bytes;
  stats_.requested_bytes += requested;
  ++stats_.num_blocks;
}

Arena::Blocks::iterator Arena::add_slab(std::size_t bytes) {
  const auto room = [&] { return stats_.budget_bytes - stats_.reserved_bytes; };
  if (bytes > room()) trim_locked();
  if (bytes > room()) return blocks_.end();
  std::size_t slab = std::min(std::max(bytes, slab_bytes_), room());
  ++stats_.num_upstream_calls;
  void* data = upstream_->allocate(slab);
  if (data == nullptr && (trim_locked() > 0 || slab > bytes)) {
    slab = bytes;  // the device is nearly full: take no more than the request
    ++stats_.num_upstream_calls;
    data = upstream_->allocate(slab);
  }
  if (data == nullptr) return blocks_.end();
  stats_.reserved_bytes += slab;
  ++stats_.num_slabs;
  const auto block =
      blocks_.emplace(static_cast<std::byte*>(data), Block{slab, 0, true, true, nullptr}).first;
  insert_free(block);
  return block;
}

void* Arena::allocate(std::size_t requested, void* stream) {
  const std::size_t bytes = round_up(requested);
  std::lock_guard lock(mutex_);
  const auto fit = by_size_.lower_bound({bytes, nullptr});
  const auto block = fit != by_size_.end() ? blocks_.find(fit->second) : add_slab(bytes);
  if (block == blocks_.end()) {
    detail::fail<OutOfMemory>(
        __FILE__, __LINE__, requested, " bytes were asked for; ", stats_.allocated_bytes,
        " of a budget of ", stats_.budget_bytes, " bytes are allocated, ", stats_.reserved_bytes,
        " reserved, and the device has ", upstream_->free_bytes(), " bytes free");
  }
  // The freeing stream may still read the block: wait before another stream writes it.
  if (block->second.stream != nullptr && block->second.stream != stream) {
    upstream_->synchronize(block->second.stream);
  }
  erase_free(block);
  take(block, bytes, requested, stream);
  ++stats_.num_allocations;
  note_peaks();
  return block->first;
}

Arena::Blocks::iterator Arena::find_live(const void* data) {
  const auto block = blocks_.find(static_cast<std::byte*>(const_cast<void*>(data)));
  FASTGPT_CHECK(block != blocks_.end() && !block->second.is_free, "pointer ", data,
                " is not a live block of this arena; was it freed before?");
  return block;
}

void Arena::free(void* data, void* stream) {
  std::lock_guard lock(mutex_);
  auto block = find_live(data);
  stats_.allocated_bytes -= block->second.bytes;
  stats_.requested_bytes -= block->second.requested;
  --stats_.num_blocks;
  block->second.requested = 0;
  block->second.stream = stream;
  // A merged block remembers one stream, so the other is waited for: cheaper than an event list,
  // and it happens only where streams are mixed.
  const auto absorb = [&](Blocks::iterator left, Blocks::iterator right) {
    if (left->second.stream != right->second.stream) {
      if (left->second.stream != nullptr) upstream_->synchronize(left->second.stream);
      left->second.stream = right->second.stream;
    }
    left->second.bytes += right->second.bytes;
    blocks_.erase(right);
  };
  if (const auto next = std::next(block);
      next != blocks_.end() && next->second.is_free && !next->second.starts_slab) {
    erase_free(next);
    absorb(block, next);
  }
  if (!block->second.starts_slab) {
    if (const auto previous = std::prev(block); previous->second.is_free) {
      erase_free(previous);
      absorb(previous, block);
      block = previous;
    }
  }
  insert_free(block);
}

bool Arena::grow(void* data, std::size_t requested, void* stream) {
  const std::size_t bytes = round_up(requested);
  std::lock_guard lock(mutex_);
  const auto block = find_live(data);
  const std::size_t have = block->second.bytes;
  if (bytes > have) {
    const auto next = std::next(block);
    if (next == blocks_.end() || !next->second.is_free || next->second.starts_slab ||
        have + next->second.bytes < bytes) {
      return false;
    }
    if (next->second.stream != nullptr && next->second.stream != stream) {
      upstream_->synchronize(next->second.stream);
    }
    erase_free(next);
    block->second.bytes += next->second.bytes;
    blocks_.erase(next);
  }
  stats_.allocated_bytes -= have;
  stats_.requested_bytes -= block->second.requested;
  --stats_.num_blocks;
  take(block, std::max(bytes, have), requested, stream);
  note_peaks();
  return true;
}

std::size_t Arena::trim_locked() {
  std::size_t released = 0;
  for (auto block = blocks_.begin(); block != blocks_.end();) {
    const auto next = std::next(block);
    const bool whole_slab = block->second.is_free && block->second.starts_slab &&
                            (next == blocks_.end() || next->second.starts_slab);
    if (whole_slab) {
      if (block->second.stream != nullptr) upstream_->synchronize(block->second.stream);
      erase_free(block);
      released += block->second.bytes;
      stats_.reserved_bytes -= block->second.bytes;
      --stats_.num_slabs;
      ++stats_.num_upstream_calls;
      upstream_->free(block->first, block->second.bytes);
      blocks_.erase(block);
    }
    block = next;
  }
  return released;
}

std::size_t Arena::trim() {
  std::lock_guard lock(mutex_);
  return trim_locked();
}

std::size_t Arena::block_bytes(const void* data) const {
  std::lock_guard lock(mutex_);
  return const_cast<Arena*>(this)->find_live(data)->second.bytes;
}

ArenaStats Arena::stats() const {
  std::lock_guard lock(mutex_);
  ArenaStats stats = stats_;
  stats.largest_free_bytes = by_size_.empty() ? 0 : by_size_.rbegin()->first;
  return stats;
}

void Arena::reset_peaks() {
  std::lock_guard lock(mutex_);
  stats_.peak_allocated_bytes = stats_.allocated_bytes;
  stats_.peak_reserved_bytes = stats_.reserved_bytes;
}

void Arena::check_integrity() const {
  std::lock_guard lock(mutex_);
  const auto require = [](bool holds, const char* what) {
    if (!holds) detail::fail<Error>(__FILE__, __LINE__, "arena invariant broken: ", what);
  };
  std::size_t allocated = 0;
  std::size_t requested = 0;
  std::size_t free = 0;
  std::size_t num_free = 0;
  std::size_t slabs = 0;
  std::size_t live = 0;
  const std::byte* end = nullptr;
  bool previous_free = false;
  for (const auto& [data, block] : blocks_) {
    require(block.starts_slab || data == end, "blocks of a slab are adjacent");
    require(!(block.is_free && previous_free && !block.starts_slab), "free neighbours are merged");
    require(block.bytes > 0 && block.bytes % kArenaAlignment == 0, "sizes are multiples of 256");
    require(by_size_.contains({block.bytes, data}) == block.is_free, "free blocks are indexed");
    slabs += block.starts_slab ? 1 : 0;
    (block.is_free ? free : allocated) += block.bytes;
    num_free += block.is_free ? 1 : 0;
    live += block.is_free ? 0 : 1;
    requested += block.requested;
    end = data + block.bytes;
    previous_free = block.is_free;
  }
  require(num_free == by_size_.size(), "the index holds free blocks only");
  require(allocated == stats_.allocated_bytes, "allocated_bytes counts live blocks");
  require(requested == stats_.requested_bytes, "requested_bytes counts live requests");
  require(allocated + free == stats_.reserved_bytes, "reserved = allocated + free");
  require(stats_.reserved_bytes <= stats_.budget_bytes, "reserved <= budget");
  require(slabs == stats_.num_slabs && live == stats_.num_blocks, "slabs and blocks are counted");
}

}  // namespace fastgpt
