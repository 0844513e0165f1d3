#include "fastgpt/layer_cache.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace fastgpt {
namespace {

/// An event for one wait.
class ScopedEvent {
 public:
  explicit ScopedEvent(Upstream& upstream) : upstream_(upstream), event_(upstream.create_event()) {}
  ~ScopedEvent() {
    if (event_ != nullptr) upstream_.destroy_event(event_);
  }
  ScopedEvent(const ScopedEvent&) = delete;
  ScopedEvent& operator=(const ScopedEvent&) = delete;
  Event get() const { return event_; }
  Event release() { return std::exchange(event_, nullptr); }

 private:
  Upstream& upstream_;
  Event event_;
};

}  // namespace

Lease::~Lease() { cache_->release_lease(id_); }

LayerCache::LayerCache(std::unique_ptr<Arena> arena, SwapOptions swap)
    : arena_(std::move(arena)), swap_(std::move(swap)) {
  if (swap_.host == nullptr) return;
  FASTGPT_CHECK(arena_->can_evict(),
                "this device's memory comes in fixed slabs; nothing can be "
                "evicted, so swap to host memory must be off");
  out_stream_ = arena_->upstream().create_stream();
  in_stream_ = arena_->upstream().create_stream();
}

LayerCache::~LayerCache() {
  Upstream& upstream = arena_->upstream();
  upstream.synchronize_device();
  for (auto& [id, buffer] : buffers_) {
    drop_event(buffer);
    drop_host_copy(buffer);
  }
  if (out_stream_ != nullptr) upstream.destroy_stream(out_stream_);
  if (in_stream_ != nullptr) upstream.destroy_stream(in_stream_);
}

std::vector<EntryInfo> LayerCache::entries_locked() const {
  std::vector<EntryInfo> entries;
  for (const auto& [name, id] : names_) {
    const Buffer& buffer = buffers_.at(id);
    entries.push_back({name, buffer.bytes, buffer.num_leases, buffer.where == Where::kHost});
  }
  std::sort(entries.begin(), entries.end(), [](const EntryInfo& a, const EntryInfo& b) {
    return a.bytes != b.bytes ? a.bytes > b.bytes : a.name < b.name;
  });
  return entries;
}

void* LayerCache::allocate_or_explain(std::size_t bytes, const std::string& name, void* stream,
                                      Lock& lock) {
  for (;;) {
    try {
      return arena_->allocate(bytes, stream);
    } catch (const OutOfMemory& error) {
      if (swap_.evict_when_full && evict_one(lock)) continue;
      std::string message = (name.empty() ? std::string("an unnamed buffer") : "'" + name + "'") +
                            ": " + error.what() + "; largest entries:";
      const auto entries = entries_locked();
      for (std::size_t i = 0; i < std::min<std::size_t>(3, entries.size()); ++i) {
        message += " '" + entries[i].name + "' " + std::to_string(entries[i].bytes) + " bytes" +
                   (entries[i].is_evicted ? " (evicted)," : ",");
      }
      if (entries.empty()) message += " none,";
      message += " free one, raise the budget (memory_pool_size) or lower batch_size or max_length";
      if (!swap_.evict_when_full) message += ", or let the pool evict (swap_to_cpu)";
      throw OutOfMemory(message);
    }
  }
}

std::unique_ptr<Lease> LayerCache::lease(std::uint64_t id) {
  Buffer& buffer = buffers_.at(id);
  auto lease = std::make_unique<Lease>(shared_from_this(), id, buffer.data, buffer.bytes);
  ++buffer.num_leases;
  return lease;
}

std::unique_ptr<Lease> LayerCache::allocate(std::size_t bytes, const std::string& name,
                                            const std::string& layout, Contents contents,
                                            void* stream) {
  Lock lock(mutex_);
  Upstream& upstream = arena_->upstream();
  const auto make = [&](void* data) {
    const std::uint64_t id = next_id_++;
    Buffer& buffer = buffers_[id];
    buffer.data = data;
    buffer.bytes = bytes;
    buffer.layout = layout;
    buffer.named = !name.empty();
    use(buffer, stream);
    return id;
  };
  std::uint64_t id = 0;
  std::size_t kept = 0;  // leading bytes that already hold what kKeep promises
  void* fresh = nullptr;
  if (name.empty() || !names_.contains(name)) {
    fresh = allocate_or_explain(bytes, name, stream, lock);
    if (!name.empty() && names_.contains(name)) {  // made by another thread while we evicted
      arena_->free(std::exchange(fresh, nullptr), stream);
    }
  }
  if (fresh != nullptr) {
    id = make(fresh);
    if (!name.empty()) names_.emplace(name, id);
  } else {
    id = names_.at(name);
    restore_locked(id, stream, lock);
    Buffer& old = buffers_.at(id);
    kept = std::min(bytes, old.bytes);
    const bool same = old.layout == layout && old.bytes == bytes;
    if (!same || contents == Contents::kZero) {
      FASTGPT_CHECK(old.num_pins == 0 && old.num_acquired == 0, "'", name,
                    "' is pinned or leased; it keeps its shape and contents until that ends");
      old.is_frozen = false;
      drop_host_copy(old);
    }
    if (same || (old.num_leases == 0 && arena_->grow(old.data, bytes, stream))) {
      old.bytes = bytes;
      old.layout = layout;
      use(old, stream);
    } else {
      ++old.num_pins;  // not a victim of its own move
      void* data = nullptr;
      try {
        data = allocate_or_explain(bytes, name, stream, lock);
        if (contents == Contents::kKeep) upstream.copy(data, old.data, kept, stream);
      } catch (...) {
        --buffers_.at(id).num_pins;
        if (data != nullptr) arena_->free(data, stream);
        throw;
      }
      Buffer& moved = buffers_.at(id);
      --moved.num_pins;
      const int schedule_index = std::exchange(moved.schedule_index, -1);
      abandon(id, stream);
      id = make(data);
      buffers_.at(id).schedule_index = schedule_index;
      names_[name] = id;
    }
  }
  if (contents == Contents::kZero) kept = 0;
  if (contents != Contents::kUndefined && kept < bytes) {
    auto* const data = static_cast<std::byte*>(buffers_.at(id).data);
    upstream.fill_zero(data + kept, bytes - kept, stream);
  }
  return lease(id);
}

void LayerCache::use(Buffer& buffer, void* stream) {
  if (buffer.returned != nullptr) {
    Upstream& upstream = arena_->upstream();
    if (upstream.query(buffer.returned)) {
      drop_event(buffer);
    } else {
      upstream.wait(stream, buffer.returned);
    }
  }
  buffer.stream = stream;
  auto& users = buffer.users;
  if (std::find(users.begin(), users.end(), stream) == users.end()) users.push_back(stream);
}

void LayerCache::drop_event(Buffer& buffer) {
  if (buffer.returned != nullptr) arena_->upstream().destroy_event(buffer.returned);
  buffer.returned = nullptr;
}

void LayerCache::drop_host_copy(Buffer& buffer) {
  if (buffer.host_data == nullptr) return;
  swap_.host->free(buffer.host_data, in_stream_);  // the last to read it
  swap_stats_.host_bytes -= buffer.host_bytes;
  buffer.host_data = nullptr;
}

// The buffer loses its name: free it now, or with its last lease.
void LayerCache::abandon(std::uint64_t id, void* stream) {
  Buffer& buffer = buffers_.at(id);
  buffer.named = false;
  if (buffer.num_leases > 0) return;
  // `stream` is ordered after every other user: the caller says so, as for any free.
  drop_host_copy(buffer);
  if (buffer.returned != nullptr && buffer.where == Where::kDevice) {
    arena_->record_use(buffer.data, in_stream_);
  }
  drop_event(buffer);
  arena_->free(buffer.data, stream);
  buffers_.erase(id);
}

void LayerCache::free(const std::string& name, void* stream) {
  Lock lock(mutex_);
  const std::uint64_t id = find(name);
  FASTGPT_CHECK(settled(id, lock).num_acquired == 0 && buffers_.at(id).num_pins == 0, "'", name,
                "' is pinned or leased; end that before freeing it");
  // Who holds a lease goes on using the memory.
  if (buffers_.at(id).num_leases > 0) restore_locked(id, stream, lock);
  abandon(id, stream);
  names_.erase(name);
}

// Runs where a tensor dies, on any thread. It may not throw: a failure here would be our own
// broken bookkeeping, and leaking one block is better than ending the process.
void LayerCache::release_lease(std::uint64_t id) noexcept {
  try {
    std::lock_guard lock(mutex_);
    Buffer& buffer = buffers_.at(id);
    --buffer.num_leases;
    if (!buffer.named) abandon(id, buffer.stream);
  } catch (const std::exception&) {
  }
}

std::uint64_t LayerCache::find(const std::string& name) const {
  const auto found = names_.find(name);
  FASTGPT_CHECK(found != names_.end(), "there is no entry '", name, "' in this pool");
  return found->second;
}

// The buffer, when nobody is moving it.
LayerCache::Buffer& LayerCache::settled(std::uint64_t id, Lock& lock) {
  const auto moving = [&] {
    const auto found = buffers_.find(id);
    return found != buffers_.end() &&
           (found->second.where == Where::kLeaving || found->second.where == Where::kReturning);
  };
  while (moving()) moved_.wait(lock);
  const auto found = buffers_.find(id);
  FASTGPT_CHECK(found != buffers_.end(), "the entry was freed by another thread meanwhile");
  return found->second;
}

void LayerCache::pin(const std::string& name) {
  Lock lock(mutex_);
  Buffer& buffer = settled(find(name), lock);
  FASTGPT_CHECK(buffer.where == Where::kDevice, "'", name, "' is evicted; restore it, then pin it");
  ++buffer.num_pins;
}

void LayerCache::unpin(const std::string& name) {
  std::lock_guard lock(mutex_);
  Buffer& buffer = buffers_.at(find(name));
  FASTGPT_CHECK(buffer.num_pins > 0, "'", name, "' is not pinned");
  --buffer.num_pins;
}

void LayerCache::acquire(const std::string& name, void* stream) {
  Lock lock(mutex_);
  const std::uint64_t id = find(name);
  restore_locked(id, stream, lock);
  Buffer& buffer = buffers_.at(id);
  use(buffer, stream);
  ++buffer.num_acquired;
  if (buffer.schedule_index >= 0) schedule_at_ = buffer.schedule_index + 1;
}

void LayerCache::release(const std::string& name, void* stream) {
  std::lock_guard lock(mutex_);
  Buffer& buffer = buffers_.at(find(name));
  FASTGPT_CHECK(buffer.num_acquired > 0, "'", name, "' is not leased");
  use(buffer, stream);
  --buffer.num_acquired;
}

void LayerCache::record_use_of(void* data, void* stream) {
  Lock lock(mutex_);
  const auto found = std::find_if(buffers_.begin(), buffers_.end(),
                                  [&](const auto& entry) { return entry.second.data == data; });
  FASTGPT_CHECK(found != buffers_.end(), "pointer ", data, " does not start a buffer of this pool");
  Buffer& buffer = settled(found->first, lock);
  FASTGPT_CHECK(buffer.where == Where::kDevice, "the buffer is evicted; restore it first");
  void* const owner = buffer.stream;
  use(buffer, stream);
  buffer.stream = owner;
  arena_->record_use(data, stream);
}

void LayerCache::freeze(const std::string& name) {
  Lock lock(mutex_);
  settled(find(name), lock).is_frozen = true;
}

void LayerCache::thaw(const std::string& name) {
  Lock lock(mutex_);
  Buffer& buffer = settled(find(name), lock);
  buffer.is_frozen = false;
  if (buffer.where == Where::kDevice) drop_host_copy(buffer);
}

void LayerCache::set_schedule(const std::vector<std::string>& names) {
  std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < names.size(); ++i) {
    (void)find(names[i]);
    FASTGPT_CHECK(
        std::find(names.begin() + std::ptrdiff_t(i) + 1, names.end(), names[i]) == names.end(), "'",
        names[i], "' is in the schedule twice");
  }
  for (auto& [id, buffer] : buffers_) buffer.schedule_index = -1;
  for (std::size_t i = 0; i < names.size(); ++i) {
    buffers_.at(find(names[i])).schedule_index = int(i);
  }
  schedule_size_ = int(names.size());
  schedule_at_ = 0;
}

bool LayerCache::may_evict(const Buffer& buffer) const {
  return buffer.named && buffer.where == Where::kDevice && buffer.num_pins == 0 &&
         buffer.num_acquired == 0 && (buffer.num_leases == 0 || buffer.schedule_index >= 0);
}

// Evict the entry whose next use is farthest: first those without a schedule, of which nothing is
// known, then by the distance ahead in the schedule. Optimal for a known order (Belady).
bool LayerCache::evict_one(Lock& lock) {
  std::uint64_t victim = 0;
  std::tuple<int, std::size_t> farthest{-1, 0};
  for (const auto& [id, buffer] : buffers_) {
    if (!may_evict(buffer)) continue;
    const int distance =
        buffer.schedule_index < 0
            ? schedule_size_
            : (buffer.schedule_index - schedule_at_ + schedule_size_) % schedule_size_;
    if (const std::tuple rank{distance, buffer.bytes}; rank > farthest) {
      farthest = rank;
      victim = id;
    }
  }
  if (victim == 0) return false;
  evict_locked(victim, lock);
  return true;
}

void* LayerCache::allocate_on_host(std::size_t bytes) {
  try {
    return swap_.host->allocate(bytes, out_stream_);
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(std::string("no host memory to evict an entry to: ") + error.what());
  }
}

// The lock is open while the device copies. On failure the entry is on the device as before.
void LayerCache::evict_locked(std::uint64_t id, Lock& lock) {
  Upstream& upstream = arena_->upstream();
  Buffer& buffer = buffers_.at(id);  // stays: nobody erases a buffer that is leaving
  buffer.where = Where::kLeaving;
  const bool is_clean = buffer.is_frozen && buffer.host_data != nullptr;
  void* host = nullptr;
  lock.unlock();
  try {
    if (!is_clean) host = allocate_on_host(buffer.bytes);
    ScopedEvent used(upstream);
    if (buffer.returned != nullptr) upstream.wait(out_stream_, buffer.returned);
    for (void* user : buffer.users) {
      upstream.record(used.get(), user);
      upstream.wait(out_stream_, used.get());
    }
    for (std::size_t at = 0; host != nullptr && at < buffer.bytes; at += swap_.chunk_bytes) {
      upstream.copy(static_cast<std::byte*>(host) + at, static_cast<std::byte*>(buffer.data) + at,
                    std::min(swap_.chunk_bytes, buffer.bytes - at), out_stream_);
    }
    upstream.record(used.get(), out_stream_);
    upstream.synchronize(used.get());
    arena_->evict(buffer.data);
  } catch (...) {
    if (host != nullptr) swap_.host->free(host, out_stream_);
    lock.lock();
    buffer.where = Where::kDevice;
    moved_.notify_all();
    throw;
  }
  lock.lock();
  if (host != nullptr) {
    drop_host_copy(buffer);
    buffer.host_data = host;
    buffer.host_bytes = buffer.bytes;
    swap_stats_.host_bytes += buffer.bytes;
  }
  drop_event(buffer);
  buffer.users.clear();
  buffer.where = Where::kHost;
  ++swap_stats_.num_evictions;
  swap_stats_.num_clean_evictions += is_clean ? 1 : 0;
  moved_.notify_all();
}

void LayerCache::restore_locked(std::uint64_t id, void* stream, Lock& lock) {
  if (settled(id, lock).where == Where::kDevice) return;
  Upstream& upstream = arena_->upstream();
  Buffer& buffer = buffers_.at(id);
  buffer.where = Where::kReturning;
  bool has_memory = false;
  try {
    for (;;) {
      try {
        lock.unlock();
        arena_->restore(buffer.data);
        lock.lock();
        has_memory = true;
        break;
      } catch (const OutOfMemory&) {
        lock.lock();
        if (!swap_.evict_when_full || !evict_one(lock)) throw;
      }
    }
    ScopedEvent returned(upstream);
    for (std::size_t at = 0; at < buffer.bytes; at += swap_.chunk_bytes) {
      upstream.copy(static_cast<std::byte*>(buffer.data) + at,
                    static_cast<std::byte*>(buffer.host_data) + at,
                    std::min(swap_.chunk_bytes, buffer.bytes - at), in_stream_);
    }
    upstream.record(returned.get(), in_stream_);
    upstream.wait(stream, returned.get());
    buffer.returned = returned.release();
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    // Copies that were queued before the failure still read the host's bytes and write here.
    if (has_memory) {
      upstream.synchronize_device();
      arena_->evict(buffer.data);
    }
    buffer.where = Where::kHost;
    moved_.notify_all();
    throw;
  }
  if (!buffer.is_frozen) drop_host_copy(buffer);
  buffer.where = Where::kDevice;
  buffer.users = {in_stream_, stream};
  buffer.stream = stream;
  ++swap_stats_.num_restores;
  moved_.notify_all();
}

void LayerCache::evict(const std::string& name) {
  Lock lock(mutex_);
  FASTGPT_CHECK(swap_.host != nullptr, "this pool has no host memory to evict '", name,
                "' to; make it with swap_to_cpu");
  const std::uint64_t id = find(name);
  const Buffer& buffer = settled(id, lock);
  if (buffer.where == Where::kHost) return;
  FASTGPT_CHECK(buffer.num_pins == 0, "'", name, "' is pinned; unpin it before evicting it");
  FASTGPT_CHECK(buffer.num_acquired == 0, "'", name, "' is leased; evict it after that");
  FASTGPT_CHECK(may_evict(buffer), "'", name, "' is held by ", buffer.num_leases,
                " tensors that may use it at any time; drop them or put it in the schedule");
  evict_locked(id, lock);
}

void LayerCache::restore(const std::string& name, void* stream) {
  Lock lock(mutex_);
  const std::uint64_t id = find(name);
  restore_locked(id, stream, lock);
  use(buffers_.at(id), stream);  // back already, perhaps for another stream
}

bool LayerCache::contains(const std::string& name) const {
  std::lock_guard lock(mutex_);
  return names_.contains(name);
}

std::vector<EntryInfo> LayerCache::entries() const {
  std::lock_guard lock(mutex_);
  return entries_locked();
}

SwapStats LayerCache::swap_stats() const {
  std::lock_guard lock(mutex_);
  return swap_stats_;
}

}  // namespace fastgpt
