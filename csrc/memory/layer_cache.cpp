#include "fastgpt/layer_cache.h"

#include <algorithm>

namespace fastgpt {

Lease::~Lease() { cache_->release(id_); }

std::vector<EntryInfo> LayerCache::entries_locked() const {
  std::vector<EntryInfo> entries;
  for (const auto& [name, id] : names_) {
    const Buffer& buffer = buffers_.at(id);
    entries.push_back({name, buffer.bytes, buffer.num_leases});
  }
  std::sort(entries.begin(), entries.end(), [](const EntryInfo& a, const EntryInfo& b) {
    return a.bytes != b.bytes ? a.bytes > b.bytes : a.name < b.name;
  });
  return entries;
}

void* LayerCache::allocate_or_explain(std::size_t bytes, const std::string& name, void* stream) {
  try {
    return arena_->allocate(bytes, stream);
  } catch (const OutOfMemory& error) {
    std::string message = (name.empty() ? std::string("an unnamed buffer") : "'" + name + "'") +
                          ": " + error.what() + "; largest entries:";
    const auto entries = entries_locked();
    for (std::size_t i = 0; i < std::min<std::size_t>(3, entries.size()); ++i) {
      message += " '" + entries[i].name + "' " + std::to_string(entries[i].bytes) + " bytes,";
    }
    if (entries.empty()) message += " none,";
    message += " free one, raise the budget (memory_pool_size) or lower batch_size or max_length";
    throw OutOfMemory(message);
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
  std::lock_guard lock(mutex_);
  Upstream& upstream = arena_->upstream();
  const auto found = name.empty() ? names_.end() : names_.find(name);
  std::uint64_t id = 0;
  std::size_t kept = 0;  // leading bytes that already hold what kKeep promises
  if (found == names_.end()) {
    void* const data = allocate_or_explain(bytes, name, stream);
    id = next_id_++;
    buffers_.emplace(id, Buffer{data, bytes, layout, stream, 0, !name.empty()});
    if (!name.empty()) names_.emplace(name, id);
  } else {
    id = found->second;
    Buffer& old = buffers_.at(id);
    kept = std::min(bytes, old.bytes);
    const bool same = old.layout == layout && old.bytes == bytes;
    if (same || (old.num_leases == 0 && arena_->grow(old.data, bytes, stream))) {
      old.bytes = bytes;
      old.layout = layout;
      old.stream = stream;
    } else {
      void* const data = allocate_or_explain(bytes, name, stream);
      if (contents == Contents::kKeep) upstream.copy(data, old.data, kept, stream);
      abandon(id, stream);
      id = next_id_++;
      buffers_.emplace(id, Buffer{data, bytes, layout, stream, 0, true});
      found->second = id;
    }
  }
  if (contents == Contents::kZero) kept = 0;
  if (contents != Contents::kUndefined && kept < bytes) {
    auto* const data = static_cast<std::byte*>(buffers_.at(id).data);
    upstream.fill_zero(data + kept, bytes - kept, stream);
  }
  return lease(id);
}

// The buffer loses its name: free it now, or with its last lease.
void LayerCache::abandon(std::uint64_t id, void* stream) {
  Buffer& buffer = buffers_.at(id);
  buffer.named = false;
  if (buffer.num_leases > 0) return;
  arena_->free(buffer.data, stream);
  buffers_.erase(id);
}

void LayerCache::free(const std::string& name, void* stream) {
  std::lock_guard lock(mutex_);
  const auto found = names_.find(name);
  FASTGPT_CHECK(found != names_.end(), "there is no entry '", name, "' in this pool");
  abandon(found->second, stream);
  names_.erase(found);
}

// Runs where a tensor dies, on any thread. It may not throw: a failure here would be our own
// broken bookkeeping, and leaking one block is better than ending the process.
void LayerCache::release(std::uint64_t id) noexcept {
  try {
    std::lock_guard lock(mutex_);
    Buffer& buffer = buffers_.at(id);
    --buffer.num_leases;
    if (!buffer.named) abandon(id, buffer.stream);
  } catch (const std::exception&) {
  }
}

bool LayerCache::contains(const std::string& name) const {
  std::lock_guard lock(mutex_);
  return names_.contains(name);
}

std::vector<EntryInfo> LayerCache::entries() const {
  std::lock_guard lock(mutex_);
  return entries_locked();
}

}  // namespace fastgpt
