#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "fastgpt/fake_upstream.h"
#include "runtime/happens_before.h"

namespace fastgpt {
namespace {

std::byte* bytes_of(const void* data) { return static_cast<std::byte*>(const_cast<void*>(data)); }

}  // namespace

FakeUpstream::FakeUpstream(Options options)
    : options_(options), random_(options.seed), order_(std::make_unique<HappensBefore>()) {}

FakeUpstream::~FakeUpstream() {
  for (const auto& [data, handle] : mapped_) {
    if (handle.id == 0) munmap(data, handle.bytes);
  }
}

void FakeUpstream::fail_at(std::uint64_t call, std::uint64_t num, bool throws) {
  std::lock_guard lock(mutex_);
  fail_at_ = num_calls_ + call;
  num_fails_ = call == 0 ? 0 : num;
  fail_throws_ = throws;
}

std::uint64_t FakeUpstream::num_calls() const {
  std::lock_guard lock(mutex_);
  return num_calls_;
}

std::int64_t FakeUpstream::num_events() const {
  std::lock_guard lock(mutex_);
  return num_events_;
}

std::int64_t FakeUpstream::num_streams() const {
  std::lock_guard lock(mutex_);
  return num_streams_;
}

std::uint64_t FakeUpstream::num_memory_calls() const {
  std::lock_guard lock(mutex_);
  return num_memory_calls_;
}

bool FakeUpstream::fails() {
  return ++num_calls_ >= fail_at_ && num_calls_ - fail_at_ < num_fails_;
}

void FakeUpstream::may_throw(const char* call) {
  if (fails()) detail::fail<DeviceError>(__FILE__, __LINE__, "injected: ", call);
}

bool FakeUpstream::refuses(const char* call) {
  if (!fails()) return false;
  if (fail_throws_) detail::fail<DeviceError>(__FILE__, __LINE__, "injected: ", call);
  return true;
}

std::vector<std::string> FakeUpstream::violations() const {
  std::lock_guard lock(mutex_);
  return violations_;
}

std::size_t FakeUpstream::mapped_bytes() const {
  std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  for (const auto& [data, handle] : mapped_) bytes += handle.bytes;
  return bytes;
}

bool FakeUpstream::is_mapped(const void* data, std::size_t bytes) const {
  std::lock_guard lock(mutex_);
  return is_mapped_locked(bytes_of(data), bytes);
}

// -- memory -------------------------------------------------------------------------------------

void* FakeUpstream::reserve(std::size_t bytes) {
  if (!options_.can_map) return nullptr;
  // Aligned by hand: the kernel aligns to pages only.
  void* raw = mmap(nullptr, bytes + options_.granularity, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(raw);
  const std::size_t head =
      (options_.granularity - address % options_.granularity) % options_.granularity;
  if (head > 0) munmap(raw, head);
  if (head < options_.granularity) {
    munmap(bytes_of(raw) + head + bytes, options_.granularity - head);
  }
  std::lock_guard lock(mutex_);
  reservations_[bytes_of(raw) + head] = {bytes, std::exchange(next_limit_, ~std::size_t{0}), 0};
  return bytes_of(raw) + head;
}

void FakeUpstream::unreserve(void* address, std::size_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  for (const auto& [data, handle] : mapped_) {
    if (data >= address && data < bytes_of(address) + bytes) report("unreserved while mapped");
  }
  if (reservations_.erase(bytes_of(address)) == 0) report("unreserved what is not reserved");
  munmap(address, bytes);
}

Handle FakeUpstream::create(std::size_t bytes) {
  std::lock_guard lock(mutex_);
  ++num_memory_calls_;
  if (bytes == 0 || bytes % options_.granularity != 0) report("handle of an odd size");
  if (refuses("create") || used_bytes_ + bytes > options_.capacity_bytes) return {};
  used_bytes_ += bytes;
  handles_[next_id_] = bytes;
  return {next_id_++, bytes};
}

void FakeUpstream::destroy(Handle handle) noexcept {
  std::lock_guard lock(mutex_);
  ++num_memory_calls_;
  if (handles_.erase(handle.id) == 0) return report("unknown handle destroyed");
  for (const auto& [data, mapped] : mapped_) {
    if (mapped.id == handle.id) report("handle destroyed while mapped");
  }
  used_bytes_ -= handle.bytes;
}

bool FakeUpstream::map(void* address, const std::vector<Handle>& handles) {
  std::lock_guard lock(mutex_);
  ++num_memory_calls_;
  if (refuses("map")) return false;
  auto* at = bytes_of(address);
  auto reservation = reservations_.upper_bound(at);
  if (reservation != reservations_.begin()) --reservation;
  if (reservation == reservations_.end() || at < reservation->first ||
      at >= reservation->first + reservation->second.bytes) {
    report("mapped outside every reservation");
    return false;
  }
  if (reinterpret_cast<std::uintptr_t>(at) % options_.granularity != 0) report("mapped unaligned");
  for (const Handle handle : handles) {
    for (const auto& [data, other] : mapped_) {
      if (other.id == handle.id) report("handle mapped twice");
      if (data < at + handle.bytes && at < data + other.bytes) report("address mapped twice");
    }
    if (!handles_.contains(handle.id)) report("unknown handle mapped");
    mprotect(at, handle.bytes, PROT_READ | PROT_WRITE);
    mapped_[at] = handle;
    at += handle.bytes;
    reservation->second.mapped_bytes += handle.bytes;
  }
  if (reservation->second.mapped_bytes > reservation->second.limit_bytes) {
    report("budget exceeded: " + std::to_string(reservation->second.mapped_bytes) + " of " +
           std::to_string(reservation->second.limit_bytes) + " bytes are mapped");
  }
  return true;
}

bool FakeUpstream::unmap(void* address, Handle handle) noexcept {
  std::lock_guard lock(mutex_);
  ++num_memory_calls_;
  if (fails()) return false;
  const auto found = mapped_.find(bytes_of(address));
  if (found == mapped_.end() || found->second.id != handle.id) {
    report("unmapped what is not mapped");
    return true;
  }
  retire(found->first, handle.bytes, "unmapped");
  std::prev(reservations_.upper_bound(found->first))->second.mapped_bytes -= handle.bytes;
  madvise(address, handle.bytes, MADV_DONTNEED);
  mprotect(address, handle.bytes, PROT_NONE);
  mapped_.erase(found);
  return true;
}

void* FakeUpstream::allocate(std::size_t bytes) {
  std::lock_guard lock(mutex_);
  ++num_memory_calls_;
  if (refuses("allocate") || used_bytes_ + bytes > options_.capacity_bytes) return nullptr;
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  used_bytes_ += bytes;
  mapped_[bytes_of(data)] = {0, bytes};
  return data;
}

void FakeUpstream::free(void* data, std::size_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  ++num_memory_calls_;
  const auto found = mapped_.find(bytes_of(data));
  if (found == mapped_.end() || found->second.bytes != bytes) return report("unknown slab freed");
  retire(found->first, bytes, "freed");
  mapped_.erase(found);
  used_bytes_ -= bytes;
  munmap(data, bytes);
}

std::size_t FakeUpstream::free_bytes() const {
  std::lock_guard lock(mutex_);
  return options_.capacity_bytes - used_bytes_;
}

bool FakeUpstream::is_mapped_locked(const std::byte* data, std::size_t bytes) const {
  const std::byte* const end = data + bytes;
  auto it = mapped_.upper_bound(bytes_of(data));
  if (it != mapped_.begin()) --it;
  for (; it != mapped_.end() && it->first <= data && data < end; ++it) {
    data = std::max<const std::byte*>(data, it->first + it->second.bytes);
  }
  return data >= end;
}

void FakeUpstream::retire(const std::byte* data, std::size_t bytes, const char* what) {
  if (const auto race = order_->retire(data, bytes)) {
    report(std::string("memory was ") + what + " under " + *race);
  }
}

// -- streams ------------------------------------------------------------------------------------

// A task reads and writes `bytes` at its two sides; nullptr = not of this device.
void FakeUpstream::push(void* stream, Task task, const std::byte* reads, const std::byte* writes,
                        std::size_t bytes) {
  if (std::find(destroyed_.begin(), destroyed_.end(), stream) != destroyed_.end()) {
    return report("work on a destroyed stream");
  }
  order_->enqueue(stream);
  for (const std::byte* side : {reads, writes}) {
    if (side == nullptr) continue;
    if (!is_mapped_locked(side, bytes)) report("work is queued on memory that is not mapped");
    if (const auto race = order_->access(stream, side, bytes, side == writes)) report(*race);
  }
  task.data = writes != nullptr ? writes : reads;
  task.more_data = writes != nullptr ? reads : nullptr;
  task.bytes = bytes;
  queues_[stream].push_back(std::move(task));
}

bool FakeUpstream::is_reached(std::uint64_t mark) const {
  const auto found = marks_.find(mark);
  return found == marks_.end() || found->second;
}

bool FakeUpstream::step(void* stream) {
  Queue& queue = queues_[stream];
  if (queue.empty() || !is_reached(queue.front().waits_for)) return false;
  const Task task = std::move(queue.front());
  queue.pop_front();
  const bool is_safe = (task.data == nullptr || is_mapped_locked(task.data, task.bytes)) &&
                       (task.more_data == nullptr || is_mapped_locked(task.more_data, task.bytes));
  if (!is_safe) report("work on memory that is not mapped");
  if (task.act && is_safe) task.act();
  return true;
}

void FakeUpstream::run(std::size_t steps) {
  std::lock_guard lock(mutex_);
  std::vector<void*> streams;
  for (const auto& [stream, queue] : queues_) streams.push_back(stream);
  for (std::size_t i = 0; i < steps && !streams.empty(); ++i) {
    step(streams[random_() % streams.size()]);
  }
}

void FakeUpstream::run_all() {
  std::lock_guard lock(mutex_);
  run_until_reached(0);
}

// Until the mark is reached, or nothing moves any more. Streams take turns at random.
void FakeUpstream::run_until_reached(std::uint64_t mark) {
  std::vector<void*> streams;
  for (const auto& [stream, queue] : queues_) streams.push_back(stream);
  for (bool moved = true; moved && (mark == 0 || !is_reached(mark));) {
    moved = false;
    std::shuffle(streams.begin(), streams.end(), random_);
    for (void* stream : streams) moved |= step(stream);
  }
  if (mark != 0 && !is_reached(mark)) report("the host waits for work that can never run");
}

void FakeUpstream::write(void* data, std::size_t bytes, std::uint8_t stamp, void* stream) {
  std::lock_guard lock(mutex_);
  push(stream, {[=] { std::memset(data, stamp, bytes); }}, nullptr, bytes_of(data), bytes);
}

void FakeUpstream::expect(const void* data, std::size_t bytes, std::uint8_t stamp, void* stream) {
  std::lock_guard lock(mutex_);
  push(stream, {[=, this] {
         const auto* p = static_cast<const std::uint8_t*>(data);
         const auto wrong = std::find_if(p, p + bytes, [&](int v) { return v != stamp; });
         if (wrong == p + bytes) return;
         report("byte " + std::to_string(wrong - p) + " of " + std::to_string(bytes) +
                " holds stamp " + std::to_string(*wrong) + ", expected " + std::to_string(stamp));
       }},
       bytes_of(data), nullptr, bytes);
}

void FakeUpstream::order(void* first, void* then) {
  std::lock_guard lock(mutex_);
  FakeEvent event;
  record_locked(event, first);
  wait_locked(then, event);
}

void* FakeUpstream::create_stream() {
  std::lock_guard lock(mutex_);
  may_throw("create_stream");
  void* stream = reinterpret_cast<void*>(std::uintptr_t{0x10000} + next_id_);
  if (destroyed_.empty()) {
    ++next_id_;
  } else {
    stream = destroyed_.back();
    destroyed_.pop_back();
  }
  queues_[stream];
  ++num_streams_;
  return stream;
}

// As a driver does: what is queued still runs, and nobody has waited for it.
void FakeUpstream::destroy_stream(void* stream) noexcept {
  std::lock_guard lock(mutex_);
  run_until_reached(0);
  queues_.erase(stream);
  order_->end(stream);
  if (std::find(destroyed_.begin(), destroyed_.end(), stream) != destroyed_.end()) {
    return report("stream destroyed twice");
  }
  destroyed_.push_back(stream);
  --num_streams_;
}

Event FakeUpstream::create_event() {
  std::lock_guard lock(mutex_);
  may_throw("create_event");
  ++num_events_;
  return new FakeEvent;
}

void FakeUpstream::destroy_event(Event event) noexcept {
  std::lock_guard lock(mutex_);
  --num_events_;
  delete static_cast<FakeEvent*>(event);
}

void FakeUpstream::record(Event event, void* stream) {
  std::lock_guard lock(mutex_);
  may_throw("record");
  record_locked(*static_cast<FakeEvent*>(event), stream);
}

void FakeUpstream::record_locked(FakeEvent& event, void* stream) {
  if (capturing_.contains(stream)) report("event recorded on a capturing stream");
  const std::uint64_t mark = next_mark_++;
  marks_[mark] = false;
  event.mark = mark;
  push(stream, {[this, mark] { marks_[mark] = true; }}, nullptr, nullptr, 0);
  event.clock = order_->mark(stream);
}

void FakeUpstream::wait(void* stream, Event event) {
  std::lock_guard lock(mutex_);
  may_throw("wait");
  wait_locked(stream, *static_cast<FakeEvent*>(event));
}

void FakeUpstream::wait_locked(void* stream, const FakeEvent& event) {
  if (capturing_.contains(stream)) report("a capturing stream waits for the outside");
  push(stream, {nullptr, event.mark}, nullptr, nullptr, 0);
  order_->wait(stream, event.clock);
}

bool FakeUpstream::query(Event event) {
  std::lock_guard lock(mutex_);
  may_throw("query");
  if (!is_reached(static_cast<FakeEvent*>(event)->mark)) return false;
  order_->host_waits(static_cast<FakeEvent*>(event)->clock);
  return true;
}

void FakeUpstream::synchronize(Event event) {
  std::lock_guard lock(mutex_);
  may_throw("synchronize");
  run_until_reached(static_cast<FakeEvent*>(event)->mark);
  order_->host_waits(static_cast<FakeEvent*>(event)->clock);
}

void FakeUpstream::synchronize_device() noexcept {
  std::lock_guard lock(mutex_);
  run_until_reached(0);
  order_->host_waits_for_all();
}

bool FakeUpstream::is_capturing(void* stream) {
  std::lock_guard lock(mutex_);
  may_throw("is_capturing");
  return capturing_.contains(stream);
}

void FakeUpstream::begin_capture(void* stream) {
  std::lock_guard lock(mutex_);
  capturing_[stream] = true;
}

void FakeUpstream::end_capture(void* stream) {
  std::lock_guard lock(mutex_);
  capturing_.erase(stream);
}

void FakeUpstream::fill_zero(void* data, std::size_t bytes, void* stream) {
  std::lock_guard lock(mutex_);
  may_throw("fill_zero");
  push(stream, {[=] { std::memset(data, 0, bytes); }}, nullptr, bytes_of(data), bytes);
}

// One side may be memory of another upstream: then only the side that is ours is checked.
void FakeUpstream::copy(void* target, const void* source, std::size_t bytes, void* stream) {
  std::lock_guard lock(mutex_);
  may_throw("copy");
  const bool own_target = is_mapped_locked(bytes_of(target), bytes);
  const bool own_source = is_mapped_locked(bytes_of(source), bytes);
  if (!own_target && !own_source) report("copy between memory that is not mapped");
  push(stream, {[=] { std::memcpy(target, source, bytes); }},
       own_source ? bytes_of(source) : nullptr, own_target ? bytes_of(target) : nullptr, bytes);
}

}  // namespace fastgpt
