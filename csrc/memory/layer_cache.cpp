#include "fastgpt/layer_cache.h"

#include <algorithm>
#include <cassert>
#include <unordered_set>
#include <utility>

#include "memory/scoped_event.h"

namespace fastgpt {
namespace {

void add_user(std::vector<void*>& users, void* stream) {
  if (std::find(users.begin(), users.end(), stream) == users.end()) users.push_back(stream);
}

}  // namespace

Lease::~Lease() { cache_->release_lease(id_); }

LayerCache::LayerCache(std::unique_ptr<Arena> arena, SwapOptions swap)
    : arena_(std::move(arena)), swap_(std::move(swap)) {
  if (swap_.host == nullptr) return;
  FASTGPT_CHECK(arena_->can_evict(),
                "this device's memory comes in fixed slabs; nothing can be "
                "evicted, so swap to host memory must be off");
  Upstream& upstream = arena_->upstream();
  out_stream_ = upstream.create_stream();
  try {
    in_stream_ = upstream.create_stream();
  } catch (...) {
    upstream.destroy_stream(out_stream_);
    throw;
  }
}

LayerCache::~LayerCache() {
  Upstream& upstream = arena_->upstream();
  upstream.synchronize_device();
  for (auto& [id, buffer] : buffers_) {
    drop_event(buffer);
    drop_host_copy(buffer);
  }
  collect_orphans();
  if (out_stream_ != nullptr) upstream.destroy_stream(out_stream_);
  if (in_stream_ != nullptr) upstream.destroy_stream(in_stream_);
}

// -- allocate
// ---------------------------------------------------------------------------------------

std::unique_ptr<Lease> LayerCache::allocate(std::size_t bytes, const std::string& name,
                                            const std::string& layout, Contents contents,
                                            void* stream) {
  Lock lock(mutex_);
  collect_orphans();
  for (;;) {  // whenever the lock was open: look again
    if (const auto found = names_.find(name); found != names_.end()) {
      Buffer& buffer = buffers_.at(found->second);
      if (!is_settled(buffer)) {
        moved_.wait(lock);
      } else if (buffer.where == Where::kHost) {
        restore_locked(buffer, stream, lock);
      } else {
        return renew(found->second, bytes, layout, contents, stream, lock);
      }
      continue;
    }
    void* const data = allocate_or_explain(bytes, name, stream, lock);
    if (!names_.contains(name)) return add(data, bytes, name, layout, contents, stream);
    give_back(*arena_, data, {stream});  // another thread made the entry while we evicted
  }
}

std::unique_ptr<Lease> LayerCache::add(void* data, std::size_t bytes, const std::string& name,
                                       const std::string& layout, Contents contents, void* stream) {
  try {
    if (contents != Contents::kUndefined && bytes > 0) {
      arena_->upstream().fill_zero(data, bytes, stream);
    }
  } catch (...) {
    give_back(*arena_, data, {stream});
    throw;
  }
  const std::uint64_t id = make(data, bytes, name, layout, stream);
  return lease(id);
}

std::uint64_t LayerCache::make(void* data, std::size_t bytes, const std::string& name,
                               const std::string& layout, void* stream) {
  const std::uint64_t id = next_id_++;
  Buffer& buffer = buffers_[id];
  buffer.name = name;
  buffer.data = data;
  buffer.bytes = bytes;
  buffer.layout = layout;
  buffer.users = {stream};
  addresses_[data] = id;
  if (!name.empty()) names_[name] = id;
  return id;
}

// The entry is on the device and nobody is moving it. Its books change after the last call that
// may fail.
std::unique_ptr<Lease> LayerCache::renew(std::uint64_t id, std::size_t bytes,
                                         const std::string& layout, Contents contents, void* stream,
                                         Lock& lock) {
  Upstream& upstream = arena_->upstream();
  Buffer& old = buffers_.at(id);  // stays: who would erase it waits while it is moving
  const bool is_same = old.layout == layout && old.bytes == bytes;
  const bool is_rewritten = !is_same || contents == Contents::kZero;
  FASTGPT_CHECK(!is_rewritten || (old.num_pins == 0 && old.num_acquired == 0), "'", old.name,
                "' is pinned or leased; it keeps its shape and contents until that ends");
  wait_for_return(old, stream);
  const std::size_t kept = contents == Contents::kZero ? 0 : std::min(bytes, old.bytes);
  const auto fill_rest = [&](void* data) {
    if (contents == Contents::kUndefined || kept == bytes) return;
    upstream.fill_zero(static_cast<std::byte*>(data) + kept, bytes - kept, stream);
  };
  if (is_same || (old.num_leases == 0 && arena_->grow(old.data, bytes, stream))) {
    add_user(old.users, stream);
    try {
      fill_rest(old.data);
    } catch (...) {
      (void)arena_->grow(old.data, old.bytes, stream);  // smaller: it fits and calls no driver
      throw;
    }
    if (is_rewritten) {
      old.is_frozen = false;
      drop_host_copy(old);
    }
    old.bytes = bytes;
    old.layout = layout;
    return lease(id);
  }
  old.is_moving = true;
  add_user(old.users, stream);
  void* data = nullptr;
  try {
    data = allocate_or_explain(bytes, old.name, stream, lock);
    if (contents == Contents::kKeep && kept > 0) upstream.copy(data, old.data, kept, stream);
    fill_rest(data);
  } catch (...) {
    if (data != nullptr) give_back(*arena_, data, {stream});
    old.is_moving = false;
    moved_.notify_all();
    throw;
  }
  old.is_moving = false;
  const std::string name = std::exchange(old.name, "");
  const int schedule_index = std::exchange(old.schedule_index, -1);
  abandon(id);
  const std::uint64_t moved = make(data, bytes, name, layout, stream);
  buffers_.at(moved).schedule_index = schedule_index;
  moved_.notify_all();
  return lease(moved);
}

std::unique_ptr<Lease> LayerCache::lease(std::uint64_t id) {
  Buffer& buffer = buffers_.at(id);
  auto lease = std::make_unique<Lease>(shared_from_this(), id, buffer.data, buffer.bytes);
  ++buffer.num_leases;
  if (!buffer.name.empty()) {
    arena_->trace().record("named", buffer.data, buffer.bytes, buffer.users.back(), buffer.name);
  }
  return lease;
}

void* LayerCache::allocate_or_explain(std::size_t bytes, const std::string& name, void* stream,
                                      Lock& lock) {
  for (;;) {
    try {
      return arena_->allocate(bytes, stream);
    } catch (const OutOfMemory& error) {
      if (!swap_.evict_when_full || !evict_one(lock)) explain(name, error);
    }
  }
}

void LayerCache::explain(const std::string& name, const OutOfMemory& error) const {
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

// -- free
// -------------------------------------------------------------------------------------------

void LayerCache::free(const std::string& name, void* stream) {
  Lock lock(mutex_);
  collect_orphans();
  const auto check = [&](const Buffer& buffer) {
    FASTGPT_CHECK(buffer.num_acquired == 0 && buffer.num_pins == 0, "'", name,
                  "' is pinned or leased; end that before freeing it");
    FASTGPT_CHECK(!buffer.is_held_on_host, "'", name,
                  "' is copied through a window; close that before freeing it");
  };
  Buffer* buffer = &settled(name, lock);
  check(*buffer);
  if (buffer->num_leases > 0) {  // who holds a lease goes on using the memory
    buffer = &resident(name, stream, lock);
    check(*buffer);
  }
  if (buffer->where == Where::kDevice) add_user(buffer->users, stream);
  arena_->trace().record("forget", buffer->data, 0, stream, name);
  buffer->name.clear();
  const std::uint64_t id = std::exchange(names_.at(name), 0);
  names_.erase(name);
  abandon(id);
}

// Free a buffer that lost its name: now, or with its last lease.
void LayerCache::abandon(std::uint64_t id) noexcept {
  const auto found = buffers_.find(id);
  Buffer& buffer = found->second;
  if (buffer.num_leases > 0) return;
  drop_host_copy(buffer);
  drop_event(buffer);
  addresses_.erase(buffer.data);
  give_back(*arena_, buffer.data, std::move(buffer.users));
  buffers_.erase(found);
}

// Runs where a tensor dies, on any thread.
void LayerCache::release_lease(std::uint64_t id) noexcept {
  std::lock_guard lock(mutex_);
  Buffer& buffer = buffers_.at(id);
  --buffer.num_leases;
  if (buffer.name.empty()) abandon(id);
  collect_orphans();
}

// Free a block that streams used, or keep it for later: a tensor's end cannot fail.
void LayerCache::give_back(Arena& arena, void* data, std::vector<void*> users) noexcept {
  orphans_.push_back({&arena, data, std::move(users)});
  collect_orphans();
}

void LayerCache::collect_orphans() noexcept {
  std::erase_if(orphans_, [](const Orphan& orphan) {
    const auto& [arena, data, users] = orphan;
    try {
      if (users.size() == 1) {
        arena->free(data, users.front());
      } else {
        for (void* user : users) arena->record_use(data, user);
        arena->free_recorded(data);
      }
      return true;
    } catch (const DeviceError&) {
      return false;
    } catch (const std::exception&) {
      assert(!"the books of the pool are broken");
      return true;  // leaking one block is better than ending the process
    }
  });
}

void LayerCache::release_stream(void* stream) {
  Lock lock(mutex_);
  moved_.wait(lock, [&] {
    return std::all_of(buffers_.begin(), buffers_.end(),
                       [](const auto& entry) { return is_settled(entry.second); });
  });
  Upstream& upstream = arena_->upstream();
  FASTGPT_CHECK(!upstream.is_capturing(stream), "stream ", stream,
                " is being captured into a graph; release it after the capture");
  const auto each_user_list = [&](auto act) {
    for (auto& [id, buffer] : buffers_) act(*arena_, buffer.data, buffer.users);
    for (Orphan& orphan : orphans_) act(*orphan.arena, orphan.data, orphan.users);
  };
  bool is_user = false;
  each_user_list([&](Arena& arena, void* data, const std::vector<void*>& users) {
    if (std::find(users.begin(), users.end(), stream) == users.end()) return;
    arena.record_use(data, stream);
    is_user = true;
  });
  if (is_user && out_stream_ != nullptr) {  // what evicts later waits for it now
    memory::ScopedEvent done(upstream);
    upstream.record(done.get(), stream);
    upstream.wait(out_stream_, done.get());
  }
  arena_->release_stream(stream);
  each_user_list([&](Arena&, void*, std::vector<void*>& users) { std::erase(users, stream); });
}

std::size_t LayerCache::trim() {
  {
    std::lock_guard lock(mutex_);
    collect_orphans();
  }
  return arena_->trim();
}

// -- use
// --------------------------------------------------------------------------------------------

// Let work on `stream` come after the copy that brought the buffer back.
void LayerCache::wait_for_return(Buffer& buffer, void* stream) {
  if (buffer.returned == nullptr) return;
  Upstream& upstream = arena_->upstream();
  if (upstream.query(buffer.returned)) return drop_event(buffer);
  if (upstream.is_capturing(stream)) {
    detail::fail<DeviceError>(__FILE__, __LINE__, "'", buffer.name,
                              "' is still being copied back, and a stream that is captured into a "
                              "graph cannot wait for that; use it once before the capture");
  }
  upstream.wait(stream, buffer.returned);
}

void LayerCache::drop_event(Buffer& buffer) noexcept {
  if (buffer.returned != nullptr) arena_->upstream().destroy_event(buffer.returned);
  buffer.returned = nullptr;
}

void LayerCache::acquire(const std::string& name, void* stream) {
  Lock lock(mutex_);
  Buffer& buffer = resident(name, stream, lock);
  wait_for_return(buffer, stream);
  add_user(buffer.users, stream);
  ++buffer.num_acquired;
  arena_->trace().record("acquire", buffer.data, 0, stream, name);
  if (buffer.schedule_index >= 0) schedule_at_ = buffer.schedule_index + 1;
}

void LayerCache::release(const std::string& name, void* stream) {
  std::lock_guard lock(mutex_);
  Buffer& buffer = buffers_.at(find(name));
  FASTGPT_CHECK(buffer.num_acquired > 0, "'", name, "' is not leased");
  add_user(buffer.users, stream);
  --buffer.num_acquired;
  arena_->trace().record("release", buffer.data, 0, stream, name);
}

void LayerCache::record_use_of(void* data, void* stream) {
  Lock lock(mutex_);
  const auto find_buffer = [&]() -> Buffer& {
    const auto found = addresses_.find(data);
    FASTGPT_CHECK(found != addresses_.end(), "pointer ", data,
                  " does not start a buffer of this pool");
    return buffers_.at(found->second);
  };
  while (!is_settled(find_buffer())) moved_.wait(lock);
  Buffer& buffer = find_buffer();
  FASTGPT_CHECK(buffer.where == Where::kDevice, "the buffer is evicted; restore it first");
  wait_for_return(buffer, stream);
  add_user(buffer.users, stream);
}

void LayerCache::pin(const std::string& name) {
  Lock lock(mutex_);
  Buffer& buffer = settled(name, lock);
  FASTGPT_CHECK(buffer.where == Where::kDevice, "'", name, "' is evicted; restore it, then pin it");
  ++buffer.num_pins;
  arena_->trace().record("pin", buffer.data, 0, nullptr, name);
}

void LayerCache::unpin(const std::string& name) {
  std::lock_guard lock(mutex_);
  Buffer& buffer = buffers_.at(find(name));
  FASTGPT_CHECK(buffer.num_pins > 0, "'", name, "' is not pinned");
  --buffer.num_pins;
  arena_->trace().record("unpin", buffer.data, 0, nullptr, name);
}

void LayerCache::freeze(const std::string& name) {
  Lock lock(mutex_);
  Buffer& buffer = settled(name, lock);
  buffer.is_frozen = true;
  arena_->trace().record("freeze", buffer.data, 0, nullptr, name);
}

void LayerCache::thaw(const std::string& name) {
  Lock lock(mutex_);
  Buffer& buffer = settled(name, lock);
  FASTGPT_CHECK(!buffer.is_held_on_host, "'", name,
                "' is copied through a window; close that before thawing it");
  buffer.is_frozen = false;
  if (buffer.where == Where::kDevice) drop_host_copy(buffer);
  arena_->trace().record("thaw", buffer.data, 0, nullptr, name);
}

void LayerCache::set_schedule(const std::vector<std::string>& names) {
  std::lock_guard lock(mutex_);
  std::unordered_set<std::string> seen;
  for (const std::string& name : names) {
    (void)find(name);
    FASTGPT_CHECK(seen.insert(name).second, "'", name, "' is in the schedule twice");
  }
  for (auto& [id, buffer] : buffers_) buffer.schedule_index = -1;
  for (std::size_t i = 0; i < names.size(); ++i) {
    buffers_.at(find(names[i])).schedule_index = int(i);
  }
  schedule_size_ = int(names.size());
  schedule_at_ = 0;
}

// -- reports
// ----------------------------------------------------------------------------------------

std::uint64_t LayerCache::find(const std::string& name) const {
  const auto found = names_.find(name);
  FASTGPT_CHECK(found != names_.end(), "there is no entry '", name, "' in this pool");
  return found->second;
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
