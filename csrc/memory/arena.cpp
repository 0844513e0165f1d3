#include "fastgpt/arena.h"

#include <algorithm>

#include "memory/arena_impl.h"

namespace fastgpt {

static_assert(memory::kGranule == kArenaAlignment);

namespace {

constexpr std::size_t kMaxBlockBytes = std::size_t{1} << 46;

std::size_t block_size(std::size_t requested) {
  FASTGPT_CHECK(requested <= kMaxBlockBytes, "bytes is ", requested, "; a block has at most ",
                kMaxBlockBytes);
  const std::size_t bytes = std::max<std::size_t>(requested, 1);
  return (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
}

}  // namespace

Arena::Impl::Impl(std::shared_ptr<Upstream> upstream_in, std::size_t budget_bytes,
                  ArenaOptions options_in)
    : upstream(std::move(upstream_in)),
      options(options_in),
      backing(upstream, budget_bytes, options.handle_bytes),
      order(upstream) {
  if (!backing.can_map()) return;
  const Range all = backing.reservation();
  heap.add_slab(all.begin, std::size_t(all.end - all.begin));
  high_water = all.begin;
  if (options.ahead_bytes > 0) ahead_thread = std::thread([this] { commit_ahead(); });
}

Arena::Impl::~Impl() {
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

void* Arena::Impl::allocate(std::size_t requested, void* stream) {
  const std::size_t bytes = block_size(requested);
  if (options.use_lanes && bytes <= Lanes::kMaxBlockBytes) {
    if (Block* block = lanes.pop(stream, bytes, requested)) return block->data;
  }
  {
    std::lock_guard lock(mutex);
    if (Block* block = spare_ahead(heap.find(bytes), bytes)) {
      return hand_out(block, bytes, requested, stream);
    }
  }
  std::lock_guard grow_lock(grow);
  for (bool flushed = false;;) {
    {
      std::lock_guard lock(mutex);
      if (Block* block = spare_ahead(heap.find_thoroughly(bytes), bytes)) {
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

// Memory that was committed ahead may fit more tightly than every hole. Taking it first would have
// more committed for it at once, again and again, and leave the holes: it comes last.
Block* Arena::Impl::spare_ahead(Block* block, std::size_t bytes) {
  const bool is_ahead =
      options.ahead_bytes > 0 && block != nullptr && block->data + bytes > high_water;
  if (!is_ahead) return block;
  Block* const other = heap.find_other(bytes, block);
  return other != nullptr ? other : block;
}

void* Arena::Impl::hand_out(Block* block, std::size_t bytes, std::size_t requested, void* stream) {
  if (!order.wait(block->fence(), stream)) {
    detail::fail<DeviceError>(
        __FILE__, __LINE__, bytes,
        " bytes that another stream used would be reused by a stream that is being captured "
        "into a graph; allocate before the capture");
  }
  heap.take(block, bytes, requested);
  map.insert(block);
  count_live(block, 1);
  ++num_allocations;
  note_use(block);
  return block->data;
}

void Arena::Impl::free(void* data, void* const* stream) {
  std::uint32_t others = 0;
  Block* const block = map.with(data, [&](Block* found) {
    check_live(found, data);
    found->set(State::kLane);  // from here on a second free is refused
    others = found->streams;
    return found;
  });
  take_back(block, stream, others);
}

void Arena::Impl::take_back(Block* block, void* const* stream, std::uint32_t others) {
  try {
    const bool fits_lane = options.use_lanes && stream != nullptr && others == 0 &&
                           block->bytes <= Lanes::kMaxBlockBytes;
    if (fits_lane &&
        lanes.push(*stream, block, [&](Block* extra) { take_from_lane(extra, *stream); })) {
      return;
    }
    std::lock_guard lock(mutex);
    const Fence fence = stream == nullptr ? order.free(others) : order.free(*stream, others);
    count_live(block, -1);
    map.erase(block);
    heap.release(block, fence);
  } catch (...) {
    block->set(State::kLive);
    throw;
  }
}

Block* Arena::Impl::find_live(const void* data) {
  return map.with(data, [&](Block* found) {
    check_live(found, data);
    return found;
  });
}

bool Arena::Impl::extend(void* data, std::size_t requested, void* stream) {
  const std::size_t bytes = block_size(requested);
  Block* const block = find_live(data);
  const Block* const next = block->next;
  const bool must_grow = bytes > block->bytes;
  if (must_grow && (next == nullptr || !next->is(State::kFree) ||
                    block->bytes + next->bytes < bytes || !order.wait(next->fence(), stream))) {
    return false;
  }
  count_live(block, -1);
  if (must_grow) heap.extend(block, bytes);
  block->requested = requested;
  count_live(block, 1);
  note_use(block);
  return true;
}

void Arena::Impl::count_live(const Block* block, int sign) {
  live_requested += sign * std::int64_t(block->requested);
  allocated += sign * std::int64_t(block->bytes);
  out_bytes += std::size_t(sign) * block->bytes;
  num_blocks += sign;
}

void Arena::Impl::note_use(const Block* block) {
  if (block->end() > high_water) {
    high_water = block->end();
    note_reserved();
    if (options.ahead_bytes > 0 && ahead() < options.ahead_bytes) ahead_wanted.notify_one();
  }
  // What lanes have not published yet may be less than nothing: never more than is out.
  peak_requested = std::max(peak_requested,
                            std::min(live_requested + lanes.published(), std::int64_t(out_bytes)));
  peak_allocated = std::max(peak_allocated, out_bytes);
}

void Arena::Impl::note_reserved() {
  peak_reserved = std::max(peak_reserved, backing.committed_bytes());
  peak_touched = std::max(peak_touched, backing.committed_bytes() - ahead());
}

bool Arena::Impl::flush_lanes(void* const* only) {
  bool any = false;
  lanes.flush(
      [&](Block* block, void* stream) {
        take_from_lane(block, stream);
        any = true;
      },
      only);
  return any;
}

void Arena::Impl::take_from_lane(Block* block, void* stream) {
  std::lock_guard lock(mutex);
  const Fence fence = order.free(stream, 0);
  out_bytes -= block->bytes;
  map.erase(block);
  heap.release(block, fence);
}

void Arena::Impl::fail_out_of_memory(std::size_t requested) {
  const std::size_t device_free = upstream->free_bytes();
  std::lock_guard lock(mutex);
  detail::fail<OutOfMemory>(__FILE__, __LINE__, requested, " bytes were asked for; ", out_bytes,
                            " of a budget of ", backing.budget_bytes(), " bytes are allocated, ",
                            backing.committed_bytes(), " reserved, and the device has ",
                            device_free, " bytes free");
}

Arena::Arena(std::shared_ptr<Upstream> upstream, std::size_t budget_bytes, ArenaOptions options)
    : upstream_(std::move(upstream)),
      impl_(std::make_unique<Impl>(upstream_, budget_bytes, options)) {}

// A forked child has neither the arena's thread nor the device: it leaves everything as it is.
Arena::~Arena() {
  if (impl_->pid != getpid()) (void)impl_.release();
}

void* Arena::allocate(std::size_t bytes, void* stream) {
  void* const data = impl_->allocate(bytes, stream);
  trace_.record("allocate", data, bytes, stream);
  return data;
}

// Traced before the block is anybody else's, who may allocate it at once.
void Arena::free(void* data, void* stream) {
  trace_.record("free", data, 0, stream);
  free_block(data, &stream);
}

void Arena::free_recorded(void* data) {
  trace_.record("free", data, 0, nullptr);
  free_block(data, nullptr);
}

void Arena::free_block(void* data, void* const* stream) {
  const auto is_evicted = [](Block* block) {
    return block != nullptr && block->is(State::kEvicted) ? block : nullptr;
  };
  if (impl_->map.with(data, is_evicted) == nullptr) return impl_->free(data, stream);
  std::lock_guard grow_lock(impl_->grow);
  Block* const block = impl_->map.with(data, is_evicted);
  FASTGPT_CHECK(block != nullptr, "pointer ", data, " was restored while it was freed");
  impl_->drop_evicted(block);
}

void Arena::record_use(void* data, void* stream) {
  std::lock_guard lock(impl_->mutex);
  const std::uint32_t bit = impl_->order.use(stream);
  impl_->map.with(data, [&](Block* block) {
    Impl::check_live(block, data);
    block->streams |= bit;
  });
  trace_.record("record_use", data, 0, stream);
}

void Arena::release_stream(void* stream) {
  impl_->flush_lanes(&stream);
  std::lock_guard lock(impl_->mutex);
  impl_->order.release(stream);
  trace_.record("release_stream", nullptr, 0, stream);
}

bool Arena::grow(void* data, std::size_t requested, void* stream) {
  std::lock_guard lock(impl_->mutex);
  const bool grows = impl_->extend(data, requested, stream);
  if (grows) trace_.record("grow", data, requested, stream);
  return grows;
}

std::size_t Arena::trim() {
  std::lock_guard grow_lock(impl_->grow);
  impl_->flush_lanes(nullptr);
  const std::size_t bytes = impl_->reclaim(~std::size_t{0});
  trace_.record("trim", nullptr, bytes, nullptr);
  return bytes;
}

bool Arena::can_evict() const { return impl_->backing.can_map(); }

void Arena::evict(void* data) {
  FASTGPT_CHECK(can_evict(), "this device's memory comes in fixed slabs; nothing can be evicted");
  std::lock_guard grow_lock(impl_->grow);
  impl_->evict(impl_->find_live(data));
  trace_.record("evict", data, 0, nullptr);
}

void Arena::restore(void* data) {
  std::lock_guard grow_lock(impl_->grow);
  Block* block = impl_->map.with(data, [](Block* found) { return found; });
  FASTGPT_CHECK(block != nullptr && block->is(State::kEvicted), "pointer ", data,
                " is not an evicted block of this arena");
  impl_->restore(block);
  trace_.record("restore", data, 0, nullptr);
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
