#include <algorithm>

#include "memory/arena_impl.h"

namespace fastgpt {

// Bytes at the committed end that were never handed out.
std::size_t Arena::Impl::ahead() const {
  return backing.can_map() ? committed(high_water, backing.reservation().end) : 0;
}

// Bytes of physical memory in [begin, end).
std::size_t Arena::Impl::committed(const std::byte* begin, const std::byte* end) const {
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

ArenaStats Arena::Impl::count() const {
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

std::vector<SegmentInfo> Arena::Impl::snapshot() const {
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

void Arena::Impl::check_integrity() const {
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
  require(in_lanes == s.lane_bytes && in_lanes == lanes.counts().kept, "lanes count their blocks");
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

}  // namespace fastgpt
