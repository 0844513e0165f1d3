// Entries on their way to host memory and back.
#include <algorithm>
#include <tuple>

#include "fastgpt/layer_cache.h"
#include "memory/scoped_event.h"

namespace fastgpt {

using memory::ScopedEvent;

bool LayerCache::is_settled(const Buffer& buffer) {
  return !buffer.is_moving && (buffer.where == Where::kDevice || buffer.where == Where::kHost);
}

// The entry of this name, when nobody is moving it.
LayerCache::Buffer& LayerCache::settled(const std::string& name, Lock& lock) {
  for (;;) {
    Buffer& buffer = buffers_.at(find(name));
    if (is_settled(buffer)) return buffer;
    moved_.wait(lock);
  }
}

// The entry of this name, on the device; `stream` has to wait_for_return.
LayerCache::Buffer& LayerCache::resident(const std::string& name, void* stream, Lock& lock) {
  for (;;) {
    Buffer& buffer = settled(name, lock);
    if (buffer.where == Where::kDevice) return buffer;
    restore_locked(buffer, stream, lock);
  }
}

bool LayerCache::may_evict(const Buffer& buffer) const {
  return !buffer.name.empty() && is_settled(buffer) && buffer.where == Where::kDevice &&
         buffer.num_pins == 0 && buffer.num_acquired == 0 &&
         (buffer.num_leases == 0 || buffer.schedule_index >= 0);
}

// A stream that is captured into a graph cannot be waited for.
bool LayerCache::is_captured(const Buffer& buffer) const {
  Upstream& upstream = arena_->upstream();
  return std::any_of(buffer.users.begin(), buffer.users.end(),
                     [&](void* user) { return upstream.is_capturing(user); });
}

// Evict the entry whose next use is farthest: first those without a schedule, of which nothing is
// known, then by the distance ahead in the schedule. Optimal for a known order (Belady).
bool LayerCache::evict_one(Lock& lock) {
  Buffer* victim = nullptr;
  std::tuple<int, std::size_t> farthest{-1, 0};
  for (auto& [id, buffer] : buffers_) {
    if (!may_evict(buffer)) continue;
    const int distance =
        buffer.schedule_index < 0
            ? schedule_size_
            : (buffer.schedule_index - schedule_at_ + schedule_size_) % schedule_size_;
    if (const std::tuple rank{distance, buffer.bytes}; rank > farthest && !is_captured(buffer)) {
      farthest = rank;
      victim = &buffer;
    }
  }
  if (victim == nullptr) return false;
  evict_locked(*victim, lock);
  return true;
}

void* LayerCache::allocate_on_host(std::size_t bytes) {
  try {
    return swap_.host->allocate(bytes, out_stream_);
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(std::string("no host memory to evict an entry to: ") + error.what());
  }
}

// Queue, behind everybody who uses the buffer, the copy to `host` (null: none) and then `done`.
void LayerCache::start_eviction(Buffer& buffer, void* host, Event done) {
  Upstream& upstream = arena_->upstream();
  for (void* user : buffer.users) {
    upstream.record(done, user);
    upstream.wait(out_stream_, done);
  }
  for (std::size_t at = 0; host != nullptr && at < buffer.bytes; at += swap_.chunk_bytes) {
    upstream.copy(static_cast<std::byte*>(host) + at, static_cast<std::byte*>(buffer.data) + at,
                  std::min(swap_.chunk_bytes, buffer.bytes - at), out_stream_);
  }
  upstream.record(done, out_stream_);
}

// The buffer's memory is gone; `host` holds its bytes, null: its earlier copy does.
void LayerCache::finish_eviction(Buffer& buffer, void* host) {
  if (host != nullptr) {
    drop_host_copy(buffer);
    buffer.host_data = host;
    buffer.host_bytes = buffer.bytes;
    swap_stats_.host_bytes += buffer.bytes;
  } else {
    ++swap_stats_.num_clean_evictions;
  }
  drop_event(buffer);
  buffer.users.clear();
  buffer.where = Where::kHost;
  ++swap_stats_.num_evictions;
}

// The lock is open while the device copies; nobody erases or changes a buffer that is leaving. On
// failure the entry is on the device as before.
void LayerCache::evict_locked(Buffer& buffer, Lock& lock) {
  Upstream& upstream = arena_->upstream();
  buffer.where = Where::kLeaving;
  const bool is_clean = buffer.is_frozen && buffer.host_data != nullptr;
  void* host = nullptr;
  lock.unlock();
  try {
    if (!is_clean) host = allocate_on_host(buffer.bytes);
    ScopedEvent used(upstream);
    start_eviction(buffer, host, used.get());
    upstream.synchronize(used.get());
    arena_->evict(buffer.data);
  } catch (...) {
    upstream.synchronize_device();  // copies that are queued still read the buffer
    lock.lock();
    if (host != nullptr) give_back(*swap_.host, host, {out_stream_});
    buffer.users.push_back(out_stream_);
    buffer.where = Where::kDevice;
    moved_.notify_all();
    throw;
  }
  lock.lock();
  finish_eviction(buffer, host);
  moved_.notify_all();
}

// Queue the copy back to the device; `stream` waits for it.
void LayerCache::copy_back(Buffer& buffer, void* stream) {
  Upstream& upstream = arena_->upstream();
  ScopedEvent returned(upstream);
  for (std::size_t at = 0; at < buffer.bytes; at += swap_.chunk_bytes) {
    upstream.copy(static_cast<std::byte*>(buffer.data) + at,
                  static_cast<std::byte*>(buffer.host_data) + at,
                  std::min(swap_.chunk_bytes, buffer.bytes - at), in_stream_);
  }
  upstream.record(returned.get(), in_stream_);
  upstream.wait(stream, returned.get());
  buffer.returned = returned.release();
}

void LayerCache::finish_return(Buffer& buffer, void* stream) {
  if (!buffer.is_frozen) drop_host_copy(buffer);
  buffer.where = Where::kDevice;
  buffer.users = {in_stream_, stream};
  ++swap_stats_.num_restores;
}

// The lock is open while memory is mapped. On failure the entry is in host memory as before.
void LayerCache::restore_locked(Buffer& buffer, void* stream, Lock& lock) {
  Upstream& upstream = arena_->upstream();
  FASTGPT_CHECK(!buffer.is_held_on_host, "'", buffer.name,
                "' stays in host memory, from where a window copies it; close that first");
  if (upstream.is_capturing(stream)) {
    detail::fail<DeviceError>(__FILE__, __LINE__, "'", buffer.name,
                              "' is evicted, and a stream that is captured into a graph cannot "
                              "bring it back; restore it before the capture");
  }
  buffer.where = Where::kReturning;
  bool has_memory = false;
  try {
    while (!has_memory) {
      try {
        lock.unlock();
        arena_->restore(buffer.data);
        lock.lock();
        has_memory = true;
      } catch (const OutOfMemory& error) {
        lock.lock();
        if (!swap_.evict_when_full || !evict_one(lock)) explain(buffer.name, error);
      }
    }
    copy_back(buffer, stream);
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    if (has_memory) {
      upstream.synchronize_device();  // copies that are queued still read and write
      arena_->evict(buffer.data);
    }
    buffer.where = Where::kHost;
    moved_.notify_all();
    throw;
  }
  finish_return(buffer, stream);
  moved_.notify_all();
}

void LayerCache::drop_host_copy(Buffer& buffer) noexcept {
  if (buffer.host_data == nullptr) return;
  give_back(*swap_.host, buffer.host_data, {in_stream_});  // the last to read it
  swap_stats_.host_bytes -= buffer.host_bytes;
  buffer.host_data = nullptr;
}

void LayerCache::check_evictable(const std::string& name, const Buffer& buffer) const {
  FASTGPT_CHECK(swap_.host != nullptr, "this pool has no host memory to evict '", name,
                "' to; make it with swap_to_cpu");
  FASTGPT_CHECK(buffer.num_pins == 0, "'", name, "' is pinned; unpin it before evicting it");
  FASTGPT_CHECK(buffer.num_acquired == 0, "'", name, "' is leased; evict it after that");
  FASTGPT_CHECK(may_evict(buffer), "'", name, "' is held by ", buffer.num_leases,
                " tensors that may use it at any time; drop them or put it in the schedule");
  if (is_captured(buffer)) {
    detail::fail<DeviceError>(__FILE__, __LINE__, "'", name,
                              "' is used by a stream that is being captured into a graph; evict it "
                              "after the capture");
  }
}

void LayerCache::evict(const std::string& name) {
  Lock lock(mutex_);
  collect_orphans();
  Buffer& buffer = settled(name, lock);
  if (buffer.where == Where::kHost) return;
  check_evictable(name, buffer);
  evict_locked(buffer, lock);
}

void LayerCache::restore(const std::string& name, void* stream) {
  Lock lock(mutex_);
  Buffer& buffer = resident(name, stream, lock);
  wait_for_return(buffer, stream);  // back already, perhaps for another stream
  auto& users = buffer.users;
  if (std::find(users.begin(), users.end(), stream) == users.end()) users.push_back(stream);
}

}  // namespace fastgpt
