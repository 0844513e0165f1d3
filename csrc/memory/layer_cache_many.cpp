// Moving many entries of a layer cache at once, at the rate of the link.
#include <algorithm>

#include "fastgpt/check.h"
#include "fastgpt/layer_cache.h"

namespace fastgpt {

// On failure the entries that have left stay away, the others stay on the device.
void LayerCache::evict_all(const std::vector<std::string>& names) {
  struct Leaving {
    Buffer* buffer;  // stays: nobody erases a buffer that is leaving
    bool is_clean;
    void* host = nullptr;
    Event done = nullptr;
    bool has_left = false;
  };
  std::vector<Leaving> leaving;
  Upstream& upstream = arena_->upstream();
  Lock lock(mutex_);
  collect_orphans();
  for (const std::string& name : names) {
    const Buffer& buffer = settled(name, lock);
    if (buffer.where == Where::kDevice) check_evictable(name, buffer);
  }
  for (const std::string& name : names) {
    Buffer& buffer = buffers_.at(find(name));
    if (buffer.where != Where::kDevice) continue;  // evicted before, or named twice
    buffer.where = Where::kLeaving;
    leaving.push_back({&buffer, buffer.is_frozen && buffer.host_data != nullptr});
  }
  lock.unlock();
  std::exception_ptr error;
  try {
    for (Leaving& one : leaving) {
      if (!one.is_clean) one.host = allocate_on_host(one.buffer->bytes);
      one.done = upstream.create_event();
      start_eviction(*one.buffer, one.host, one.done);
    }
    for (Leaving& one : leaving) {
      upstream.synchronize(one.done);
      arena_->evict(one.buffer->data);
      one.has_left = true;
    }
  } catch (...) {
    error = std::current_exception();
    upstream.synchronize_device();  // copies that are queued still read buffers and write to hosts
  }
  lock.lock();
  for (Leaving& one : leaving) {
    if (one.done != nullptr) upstream.destroy_event(one.done);
    if (!one.has_left) {
      if (one.host != nullptr) give_back(*swap_.host, one.host, {out_stream_});
      one.buffer->users.push_back(out_stream_);
      one.buffer->where = Where::kDevice;
      continue;
    }
    finish_eviction(*one.buffer, one.host);
  }
  moved_.notify_all();
  if (error) std::rethrow_exception(error);
}

void LayerCache::restore_all(const std::vector<std::string>& names, void* stream) {
  std::vector<Buffer*> returning;
  if (arena_->upstream().is_capturing(stream)) {
    detail::fail<DeviceError>(__FILE__, __LINE__,
                              "a stream that is captured into a graph cannot bring entries back; "
                              "restore them before the capture");
  }
  Lock lock(mutex_);
  for (const std::string& name : names) {
    Buffer& buffer = settled(name, lock);
    FASTGPT_CHECK(!buffer.is_held_on_host, "'", name,
                  "' is copied through a window; close that before restoring it");
  }
  for (const std::string& name : names) {
    Buffer& buffer = buffers_.at(find(name));
    if (buffer.where != Where::kHost) continue;
    buffer.where = Where::kReturning;
    returning.push_back(&buffer);
  }
  lock.unlock();
  std::size_t num_mapped = 0;
  std::size_t num_copied = 0;
  std::exception_ptr error;
  try {
    for (; num_mapped < returning.size(); ++num_mapped) {
      arena_->restore(returning[num_mapped]->data);
    }
  } catch (const OutOfMemory&) {  // the rest makes room for itself, below
  } catch (...) {
    error = std::current_exception();
  }
  try {
    for (; num_copied < num_mapped; ++num_copied) copy_back(*returning[num_copied], stream);
  } catch (...) {
    error = std::current_exception();
    arena_->upstream().synchronize_device();  // copies in flight write where memory leaves
    for (std::size_t i = num_copied; i < num_mapped; ++i) arena_->evict(returning[i]->data);
  }
  lock.lock();
  for (std::size_t i = 0; i < returning.size(); ++i) {
    if (i < num_copied) {
      finish_return(*returning[i], stream);
    } else {
      returning[i]->where = Where::kHost;
    }
  }
  moved_.notify_all();
  if (error) std::rethrow_exception(error);
  lock.unlock();
  for (const std::string& name : names) restore(name, stream);  // those that are back wait only
}

const void* LayerCache::hold_host(const std::string& name) {
  Lock lock(mutex_);
  Buffer& buffer = settled(name, lock);
  FASTGPT_CHECK(buffer.where == Where::kHost && buffer.is_frozen, "'", name, "' is ",
                buffer.where == Where::kHost ? "not frozen" : "on the device",
                "; freeze and evict it before a window copies it");
  buffer.is_held_on_host = true;
  return buffer.host_data;
}

void LayerCache::release_host(const std::string& name) {
  std::lock_guard lock(mutex_);
  buffers_.at(find(name)).is_held_on_host = false;
}

}  // namespace fastgpt
