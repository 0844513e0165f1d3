#include "memory/stream_order.h"

#include <algorithm>
#include <bit>

#include "fastgpt/check.h"

namespace fastgpt::memory {
namespace {

constexpr std::uint32_t bit(int slot) { return 1U << slot; }

// Calls f(slot) for each set bit; stops and returns false when f does.
template <class F>
bool for_each_stream(std::uint32_t streams, F f) {
  for (; streams != 0; streams &= streams - 1) {
    if (!f(std::countr_zero(streams))) return false;
  }
  return true;
}

}  // namespace

StreamOrder::~StreamOrder() {
  for (Slot& slot : slots_) {
    if (slot.event != nullptr) upstream_->destroy_event(slot.event);
  }
}

int StreamOrder::find(void* stream) const {
  const auto holds = [&](int i) {
    return slots_[i].is_used && !slots_[i].is_released && slots_[i].stream == stream;
  };
  if (holds(latest_)) return latest_;
  for (int i = 0; i < kMaxStreams; ++i) {
    if (holds(i)) return latest_ = i;
  }
  return -1;
}

int StreamOrder::slot(void* stream) {
  if (const int found = find(stream); found >= 0) return found;
  int free = 0;
  while (free < kMaxStreams && slots_[free].is_used) ++free;
  if (free == kMaxStreams) free = reclaim_slot();
  Slot& slot = slots_[free];
  slot.is_used = true;
  slot.is_released = false;
  slot.stream = stream;
  return latest_ = free;
}

// Old fences may still name the slot. All they waited for is over, so at worst they wait for the
// slot's new stream without need. What others waited for there is older than any tick to come.
int StreamOrder::reclaim_slot() {
  poll();
  const auto is_idle = [](const Slot& slot) { return slot.over >= slot.last; };
  auto found = std::find_if(slots_.begin(), slots_.end(), is_idle);
  for (auto slot = slots_.begin(); found == slots_.end() && slot != slots_.end(); ++slot) {
    if (!record_up_to(*slot, slot->last)) continue;
    upstream_->synchronize(slot->event);
    slot->over = slot->recorded;
    found = slot;
  }
  if (found == slots_.end()) {
    detail::fail<DeviceError>(__FILE__, __LINE__, "more than ", kMaxStreams,
                              " streams use one pool and all are being captured into graphs");
  }
  const int index = int(found - slots_.begin());
  const Event event = found->event;
  *found = Slot{};
  found->event = event;
  return index;
}

std::uint32_t StreamOrder::use(void* stream) {
  if (upstream_->is_synchronous(stream)) return 0;
  const int at = slot(stream);
  slots_[at].last = ++clock_;
  return bit(at);
}

Fence StreamOrder::free(void* stream, std::uint32_t others) {
  return free(others | (upstream_->is_synchronous(stream) ? 0 : bit(slot(stream))));
}

Fence StreamOrder::free(std::uint32_t streams) {
  if (streams == 0) return {};
  const std::uint64_t tick = ++clock_;
  for_each_stream(streams, [&](int i) {
    if (!slots_[i].is_released) slots_[i].last = tick;  // its last event covers all it did
    return true;
  });
  return {tick, streams};
}

std::uint64_t StreamOrder::needed(const Slot& other, Fence fence) const {
  return std::min(fence.tick, other.last);
}

// Make other's event cover `tick`. @return false if its stream is being captured.
bool StreamOrder::record_up_to(Slot& other, std::uint64_t tick) {
  if (other.recorded >= tick) return true;
  if (other.is_released || upstream_->is_capturing(other.stream)) return false;
  if (other.event == nullptr) other.event = upstream_->create_event();
  upstream_->record(other.event, other.stream);
  other.recorded = clock_;
  ++num_records_;
  return true;
}

bool StreamOrder::passes(Fence fence, void* stream) {
  if (fence.streams == 0) return true;
  const int self = upstream_->is_synchronous(stream) ? -1 : find(stream);
  return for_each_stream(fence.streams, [&](int i) {
    const std::uint64_t tick = needed(slots_[i], fence);
    return i == self || slots_[i].over >= tick || (self >= 0 && slots_[self].waited[i] >= tick);
  });
}

bool StreamOrder::wait(Fence fence, void* stream) {
  if (passes(fence, stream)) return true;
  if (upstream_->is_synchronous(stream)) return wait_on_host(fence);
  if (upstream_->is_capturing(stream)) return false;
  const int self = slot(stream);
  return for_each_stream(fence.streams, [&](int i) {
    const std::uint64_t tick = needed(slots_[i], fence);
    if (i == self || slots_[i].over >= tick || slots_[self].waited[i] >= tick) return true;
    if (!record_up_to(slots_[i], tick)) return false;
    upstream_->wait(stream, slots_[i].event);
    slots_[self].waited[i] = slots_[i].recorded;
    ++num_waits_;
    return true;
  });
}

bool StreamOrder::wait_on_host(Fence fence) {
  return for_each_stream(fence.streams, [&](int i) {
    const std::uint64_t tick = needed(slots_[i], fence);
    if (slots_[i].over >= tick) return true;
    if (!record_up_to(slots_[i], tick)) return false;
    upstream_->synchronize(slots_[i].event);
    slots_[i].over = slots_[i].recorded;
    return true;
  });
}

bool StreamOrder::is_over(Fence fence) const {
  return for_each_stream(fence.streams,
                         [&](int i) { return slots_[i].over >= needed(slots_[i], fence); });
}

// What cannot be asked is not known to be over: whoever needs to know meets the error.
void StreamOrder::poll() noexcept {
  for (Slot& slot : slots_) {
    if (!slot.is_used || slot.over >= slot.last) continue;
    try {
      if (record_up_to(slot, slot.last) && upstream_->query(slot.event)) slot.over = slot.recorded;
    } catch (const std::exception&) {
    }
  }
}

void StreamOrder::release(void* stream) {
  const int at = find(stream);
  if (at < 0) return;
  FASTGPT_CHECK(record_up_to(slots_[at], slots_[at].last), "stream ", stream,
                " is being captured into a graph; release it after the capture");
  slots_[at].is_released = true;
}

}  // namespace fastgpt::memory
