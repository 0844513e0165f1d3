// Level 2 of the memory pool: named buffers that persist between calls.
#pragma once
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fastgpt/arena.h"

namespace fastgpt {

/// What a buffer holds when allocate returns.
enum class Contents {
  kUndefined,
  kZero,
  kKeep,  // the entry's previous bytes, as many as fit, then zeros
};

class LayerCache;

/// A borrowed buffer. The memory stays valid while the lease lives, whatever the cache does.
class Lease {
 public:
  Lease(std::shared_ptr<LayerCache> cache, std::uint64_t id, void* data, std::size_t bytes)
      : cache_(std::move(cache)), id_(id), data_(data), bytes_(bytes) {}
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<LayerCache> cache_;
  std::uint64_t id_;
  void* data_;
  std::size_t bytes_;
};

/// One named entry, for reports.
struct EntryInfo {
  std::string name;
  std::size_t bytes;
  int num_leases;
};

/// Names buffers of one arena. Thread-safe. Create with std::make_shared: leases hold the cache.
///
/// allocate(name) of the same size and layout returns the same memory, also while it is leased.
/// Another layout returns the same memory only when nobody holds a lease; else, or when it does
/// not fit and cannot grow in place, the name moves to new memory and the old is freed with its
/// last lease. So two views of one name never disagree about its shape.
class LayerCache : public std::enable_shared_from_this<LayerCache> {
 public:
  explicit LayerCache(std::unique_ptr<Arena> arena) : arena_(std::move(arena)) {}

  /// @param name entry to find or make; empty = a buffer of its own that dies with its lease.
  /// @param layout any text that is equal for equal shape and dtype.
  /// @throws OutOfMemory naming the request, the budget and the largest entries.
  std::unique_ptr<Lease> allocate(std::size_t bytes, const std::string& name,
                                  const std::string& layout, Contents contents, void* stream);

  /// Forget a name; its memory is freed with its last lease.
  /// @throws InvalidArgument if there is no such entry.
  void free(const std::string& name, void* stream);

  bool contains(const std::string& name) const;
  std::vector<EntryInfo> entries() const;  // largest first
  Arena& arena() { return *arena_; }

 private:
  friend class Lease;
  struct Buffer {
    void* data = nullptr;
    std::size_t bytes = 0;
    std::string layout;
    void* stream = nullptr;
    int num_leases = 0;
    bool named = false;
  };

  void* allocate_or_explain(std::size_t bytes, const std::string& name, void* stream);
  std::unique_ptr<Lease> lease(std::uint64_t id);
  void abandon(std::uint64_t id, void* stream);
  void release(std::uint64_t id) noexcept;
  std::vector<EntryInfo> entries_locked() const;

  mutable std::mutex mutex_;
  const std::unique_ptr<Arena> arena_;
  std::unordered_map<std::string, std::uint64_t> names_;
  std::unordered_map<std::uint64_t, Buffer> buffers_;
  std::uint64_t next_id_ = 1;
};

}  // namespace fastgpt
