#include "memory/heap.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>

#include "fastgpt/check.h"

namespace fastgpt::memory {

Heap::Position Heap::position(std::size_t bytes) {
  const std::size_t granules = bytes / kGranule;
  if (granules < kNumLists) return {0, int(granules)};
  const int log = std::bit_width(granules) - 1;
  return {log - 4, int((granules >> (log - 5)) & (kNumLists - 1))};
}

Block* Heap::make_block(std::byte* data, std::size_t bytes) {
  Block* block;
  if (spare_.empty()) {
    if (chunks_.empty() || num_made_ == kChunkBytes / sizeof(Block)) {
      void* chunk = std::aligned_alloc(kChunkBytes, kChunkBytes);
      if (chunk == nullptr) throw std::bad_alloc();
      chunks_.emplace_back(static_cast<Block*>(chunk));
      (void)madvise(chunk, kChunkBytes, MADV_HUGEPAGE);
      num_made_ = 0;
    }
    block = new (chunks_.back().get() + num_made_++) Block;
  } else {
    block = spare_.back();
    spare_.pop_back();
  }
  block->data = data;
  block->bytes = bytes;
  block->prev = block->next = nullptr;
  block->requested = 0;
  block->tick = 0;
  block->streams = 0;
  return block;
}

void Heap::drop_block(Block* block) { spare_.push_back(block); }

void Heap::insert(Block* block) {
  const auto [level, list] = position(block->bytes);
  List& blocks = lists_[level][list];
  block->set(State::kFree);
  block->index = blocks.size();
  blocks.push_back({block->bytes, block});
  used_lists_[level] |= 1U << list;
  used_levels_ |= std::uint64_t{1} << level;
  free_bytes_ += block->bytes;
}

void Heap::remove(Block* block) {
  const auto [level, list] = position(block->bytes);
  List& blocks = lists_[level][list];
  const Listed last = blocks.back();
  blocks[block->index] = last;
  last.block->index = block->index;
  blocks.pop_back();
  if (blocks.empty()) {
    used_lists_[level] &= ~(1U << list);
    if (used_lists_[level] == 0) used_levels_ &= ~(std::uint64_t{1} << level);
  }
  free_bytes_ -= block->bytes;
}

// Any block of a list above `at` fits.
Block* Heap::find_larger(Position at) const {
  std::uint32_t lists = at.list == kNumLists - 1 ? 0 : used_lists_[at.level] & (~1U << at.list);
  int level = at.level;
  if (lists == 0) {
    const std::uint64_t levels = used_levels_ & (~std::uint64_t{1} << level);
    if (levels == 0) return nullptr;
    level = std::countr_zero(levels);
    lists = used_lists_[level];
  }
  return lists_[level][std::countr_zero(lists)].back().block;
}

Block* Heap::fit(std::size_t bytes, std::size_t max_look) const {
  const Position own = position(bytes);
  const List& blocks = lists_[own.level][own.list];
  const Listed* best = nullptr;
  const std::size_t num_looks = std::min(max_look, blocks.size());
  for (std::size_t i = 1; i <= num_looks; ++i) {  // those freed last come first
    const Listed& listed = *(blocks.end() - std::ptrdiff_t(i));
    if (listed.bytes == bytes) return listed.block;
    if (listed.bytes > bytes && (best == nullptr || listed.bytes < best->bytes)) best = &listed;
  }
  return best != nullptr ? best->block : find_larger(own);
}

Block* Heap::find(std::size_t bytes) const { return fit(bytes, kMaxLook); }

Block* Heap::find_thoroughly(std::size_t bytes) const { return fit(bytes, ~std::size_t{0}); }

Block* Heap::find_other(std::size_t bytes, Block* block) {
  remove(block);
  Block* const other = find_thoroughly(bytes);
  insert(block);
  return other;
}

Block* Heap::split(Block* block, std::size_t bytes) {
  Block* tail = make_block(block->data + bytes, block->bytes - bytes);
  tail->prev = block;
  tail->next = block->next;
  if (tail->next != nullptr) tail->next->prev = tail;
  block->next = tail;
  block->bytes = bytes;
  return tail;
}

void Heap::take(Block* block, std::size_t bytes, std::size_t requested) {
  remove(block);
  if (block->bytes > bytes) {
    Block* tail = split(block, bytes);
    tail->tick = block->tick;
    tail->streams = block->streams;
    insert(tail);
  }
  block->requested = requested;
  block->streams = 0;
  block->tick = 0;
  block->set(State::kLive);
}

Block* Heap::merge_around(Block* block) {
  // Both neighbours are cold as a rule: ask for both at once.
  __builtin_prefetch(block->next, 1);
  __builtin_prefetch(block->prev, 1);
  const auto absorb = [&](Block* left, Block* right) {
    left->bytes += right->bytes;
    left->next = right->next;
    if (left->next != nullptr) left->next->prev = left;
    left->streams |= right->streams;
    left->tick = std::max(left->tick, right->tick);
    drop_block(right);
  };
  if (Block* next = block->next; next != nullptr && next->is(State::kFree)) {
    remove(next);
    absorb(block, next);
  }
  if (Block* prev = block->prev; prev != nullptr && prev->is(State::kFree)) {
    remove(prev);
    absorb(prev, block);
    block = prev;
  }
  return block;
}

Block* Heap::release(Block* block, Fence fence) {
  block->tick = fence.tick;
  block->streams = fence.streams;
  block = merge_around(block);
  insert(block);
  return block;
}

Fence Heap::extend(Block* block, std::size_t bytes) {
  Block* next = block->next;
  const Fence fence = next->fence();
  const std::size_t missing = bytes - block->bytes;
  remove(next);
  if (next->bytes > missing) {
    Block* rest = split(next, missing);
    rest->tick = fence.tick;
    rest->streams = fence.streams;
    insert(rest);
  }
  block->bytes += next->bytes;
  block->next = next->next;
  if (block->next != nullptr) block->next->prev = block;
  drop_block(next);
  return fence;
}

void Heap::make_void(Block* block) {
  block->set(State::kVoid);
  block->tick = 0;
  block->streams = 0;
  if (Block* next = block->next; next != nullptr && next->is(State::kVoid)) {
    voids_.erase(next->data);
    block->bytes += next->bytes;
    block->next = next->next;
    if (block->next != nullptr) block->next->prev = block;
    drop_block(next);
  }
  if (Block* prev = block->prev; prev != nullptr && prev->is(State::kVoid)) {
    prev->bytes += block->bytes;
    prev->next = block->next;
    if (prev->next != nullptr) prev->next->prev = prev;
    drop_block(block);
    return;
  }
  voids_.emplace(block->data, block);
}

Block* Heap::add_slab(std::byte* base, std::size_t bytes) {
  Block* block = make_block(base, bytes);
  slabs_.emplace(base, block);
  make_void(block);
  return block;
}

void Heap::remove_slab(Block* whole) {
  if (whole->is(State::kVoid)) voids_.erase(whole->data);
  if (whole->is(State::kFree)) remove(whole);
  slabs_.erase(whole->data);
  drop_block(whole);
}

void Heap::commit(std::byte* begin, std::byte* end) {
  auto it = voids_.upper_bound(begin);
  if (it != voids_.begin() && std::prev(it)->second->end() > begin) --it;
  while (it != voids_.end() && it->first < end) {
    Block* block = it->second;
    it = voids_.erase(it);
    if (block->data < begin) {
      Block* head = block;
      block = split(head, std::size_t(begin - head->data));
      voids_.emplace(head->data, head);
    }
    if (block->end() > end) {
      Block* tail = split(block, std::size_t(end - block->data));
      tail->set(State::kVoid);
      it = voids_.emplace(tail->data, tail).first;
    }
    release(block, {});
  }
}

void Heap::decommit(Block* block, std::byte* begin, std::byte* end) {
  while (block->data > begin && block->prev != nullptr) block = block->prev;
  while (block != nullptr && block->data < end) {
    Block* next = block->next;
    if (block->is(State::kFree) && block->end() > begin) {
      const Fence fence = block->fence();
      remove(block);
      if (block->data < begin) {
        Block* head = block;
        block = split(head, std::size_t(begin - head->data));
        insert(head);
      }
      if (block->end() > end) {
        Block* tail = split(block, std::size_t(end - block->data));
        tail->tick = fence.tick;
        tail->streams = fence.streams;
        insert(tail);
        next = nullptr;  // the tail lies beyond `end`
      } else if (next != nullptr && next->is(State::kVoid)) {
        next = next->next;  // make_void merges the void neighbour away
      }
      make_void(block);
    }
    block = next;
  }
}

std::size_t Heap::largest_free_bytes() const {
  if (used_levels_ == 0) return 0;
  const int level = 63 - std::countl_zero(used_levels_);
  const int list = 31 - std::countl_zero(used_lists_[level]);
  std::size_t largest = 0;
  for (const Listed& listed : lists_[level][list]) largest = std::max(largest, listed.bytes);
  return largest;
}

void Heap::check_integrity() const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) detail::fail<Error>(__FILE__, __LINE__, "arena invariant broken: ", what);
  };
  std::size_t free = 0;
  std::size_t num_free = 0;
  std::size_t num_void = 0;
  for (const auto& [base, first] : slabs_) {
    require(first->data == base && first->prev == nullptr, "a slab starts with its first block");
    for (const Block* block = first; block != nullptr; block = block->next) {
      require(block->bytes > 0 && block->bytes % kGranule == 0, "sizes are multiples of 256");
      const bool merged = block->is(State::kFree) || block->is(State::kVoid);
      if (const Block* next = block->next; next != nullptr) {
        require(next->data == block->end() && next->prev == block, "neighbours are adjacent");
        require(!merged || !next->is(block->state), "free neighbours are merged");
      }
      if (block->is(State::kFree)) {
        free += block->bytes;
        ++num_free;
      }
      if (block->is(State::kVoid)) {
        const auto found = voids_.find(block->data);
        require(found != voids_.end() && found->second == block, "void blocks are indexed");
        ++num_void;
      }
    }
  }
  require(num_void == voids_.size(), "the void index holds void blocks only");
  require(free == free_bytes_, "free_bytes counts free blocks");
  std::size_t indexed = 0;
  for (int level = 0; level < kNumLevels; ++level) {
    for (int list = 0; list < kNumLists; ++list) {
      const List& blocks = lists_[level][list];
      require(!blocks.empty() == ((used_lists_[level] >> list & 1U) != 0), "bitmaps are true");
      for (const auto& [bytes, block] : blocks) {
        const Position at = position(block->bytes);
        require(block->is(State::kFree) && at.level == level && at.list == list &&
                    block->bytes == bytes && blocks[block->index].block == block,
                "free blocks are in the list of their size");
        ++indexed;
      }
    }
    require((used_lists_[level] != 0) == ((used_levels_ >> level & 1U) != 0), "levels are true");
  }
  require(indexed == num_free, "free blocks are indexed");
}

}  // namespace fastgpt::memory
