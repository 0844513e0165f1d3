// Level 2 of the memory pool: named buffers that persist, and may wait in host memory.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
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
  bool is_evicted;
};

struct SwapOptions {
  std::shared_ptr<Arena> host;   // where evicted entries wait; null: nothing can be evicted
  bool evict_when_full = false;  // evict before reporting OutOfMemory
  std::size_t chunk_bytes = std::size_t{8} << 20;  // of one copy
};

/// What eviction did so far.
struct SwapStats {
  std::uint64_t num_evictions = 0;
  std::uint64_t num_clean_evictions = 0;  // no copy: the host's was still right
  std::uint64_t num_restores = 0;
  std::size_t host_bytes = 0;  // held by copies in host memory
};

/// Names buffers of one arena. Thread-safe. Create with std::make_shared: leases hold the cache.
///
/// allocate(name) of the same size and layout returns the same memory, also while it is leased.
/// Another layout returns the same memory only when nobody holds a lease; else, or when it does
/// not fit and cannot grow in place, the name moves to new memory and the old is freed with its
/// last lease. So two views of one name never disagree about its shape.
///
/// An evicted entry keeps its address; restore copies its bytes back to it. Who holds a lease may
/// touch the memory at any time, so only two kinds of entries are evicted: those without a lease,
/// and those of the schedule, which their users touch between acquire and release alone.
///
/// The cache remembers each stream that a buffer was handed out to. Whoever gets the memory next,
/// or moves it, waits for all of them; `release_stream` comes before a stream is destroyed.
///
/// A driver call that fails leaves every entry as it was: its bytes, its size, its leases. Memory
/// that cannot be freed in that moment is kept and freed by a later call.
class LayerCache : public std::enable_shared_from_this<LayerCache> {
 public:
  explicit LayerCache(std::unique_ptr<Arena> arena, SwapOptions swap = {});
  ~LayerCache();

  /// @param name entry to find or make; empty = a buffer of its own that dies with its lease.
  /// @param layout any text that is equal for equal shape and dtype.
  /// @throws OutOfMemory naming the request, the budget and the largest entries.
  std::unique_ptr<Lease> allocate(std::size_t bytes, const std::string& name,
                                  const std::string& layout, Contents contents, void* stream);

  /// Forget a name; its memory is freed with its last lease.
  /// @throws InvalidArgument if there is no such entry, or it is pinned or acquired.
  void free(const std::string& name, void* stream);

  /// Forget a stream before it is destroyed. @throws InvalidArgument while it is captured.
  void release_stream(void* stream);

  /// Give physical memory that nobody uses back, in whole handles. @return bytes.
  std::size_t trim();

  /// Never evict an entry, until unpin; counts. A CUDA graph pins what it has captured.
  void pin(const std::string& name);
  void unpin(const std::string& name);

  /// Make an entry resident for work on `stream` and keep it until release; counts.
  void acquire(const std::string& name, void* stream);
  void release(const std::string& name, void* stream);

  /// Say that `stream`, too, uses the resident buffer, named or not, that starts at `data`.
  void record_use_of(void* data, void* stream);

  /// Promise that nobody writes to an entry until thaw: its copy in host memory stays right, and
  /// a second eviction copies nothing. allocate with contents other than what is there thaws.
  void freeze(const std::string& name);
  void thaw(const std::string& name);

  /// The order, repeating, in which entries are acquired. @throws InvalidArgument if one is
  /// missing or named twice.
  void set_schedule(const std::vector<std::string>& names);

  /// Move an entry to host memory; returns when its device memory is free. Evicted: nothing.
  /// @throws InvalidArgument if it is pinned, acquired, or leased and not in the schedule.
  void evict(const std::string& name);
  /// Start to bring an entry back, to the same address; work on `stream` waits for it.
  void restore(const std::string& name, void* stream);

  /// evict for many entries, the copies of one under the unmapping of the one before it.
  void evict_all(const std::vector<std::string>& names);
  /// restore for many entries, all memory mapped before the first copy starts: the driver maps
  /// slowly under load. What does not fit makes room as restore does.
  void restore_all(const std::vector<std::string>& names, void* stream);

  /// Keep an evicted, frozen entry in host memory, until release_host: restore, allocate and free
  /// refuse it. @return its bytes. @throws InvalidArgument if it is not evicted and frozen.
  const void* hold_host(const std::string& name);
  void release_host(const std::string& name);

  bool contains(const std::string& name) const;
  std::vector<EntryInfo> entries() const;  // largest first
  SwapStats swap_stats() const;
  Arena& arena() { return *arena_; }

 private:
  friend class Lease;
  enum class Where { kDevice, kLeaving, kHost, kReturning };
  struct Buffer {
    std::string name;  // empty: dies with its last lease
    void* data = nullptr;
    std::size_t bytes = 0;
    std::string layout;
    int num_leases = 0;
    int num_pins = 0;
    int num_acquired = 0;
    int schedule_index = -1;
    bool is_frozen = false;
    bool is_held_on_host = false;
    bool is_moving = false;  // its name is on the way to other memory
    Where where = Where::kDevice;
    std::vector<void*> users;   // streams with work on it since it is on the device
    void* host_data = nullptr;  // its bytes, when evicted, or frozen and once evicted
    std::size_t host_bytes = 0;
    Event returned = nullptr;  // after the copy back; null: long ago
  };
  /// A block that the driver's failure kept from being freed.
  struct Orphan {
    Arena* arena;
    void* data;
    std::vector<void*> users;
  };
  using Lock = std::unique_lock<std::mutex>;

  // layer_cache.cpp
  void* allocate_or_explain(std::size_t bytes, const std::string& name, void* stream, Lock& lock);
  [[noreturn]] void explain(const std::string& name, const OutOfMemory& error) const;
  std::unique_ptr<Lease> add(void* data, std::size_t bytes, const std::string& name,
                             const std::string& layout, Contents contents, void* stream);
  std::unique_ptr<Lease> renew(std::uint64_t id, std::size_t bytes, const std::string& layout,
                               Contents contents, void* stream, Lock& lock);
  std::uint64_t make(void* data, std::size_t bytes, const std::string& name,
                     const std::string& layout, void* stream);
  std::unique_ptr<Lease> lease(std::uint64_t id);
  void abandon(std::uint64_t id) noexcept;
  void release_lease(std::uint64_t id) noexcept;
  std::vector<EntryInfo> entries_locked() const;
  std::uint64_t find(const std::string& name) const;
  void wait_for_return(Buffer& buffer, void* stream);
  void drop_event(Buffer& buffer) noexcept;
  void give_back(Arena& arena, void* data, std::vector<void*> users) noexcept;
  void collect_orphans() noexcept;

  // layer_cache_swap.cpp
  static bool is_settled(const Buffer& buffer);
  Buffer& settled(const std::string& name, Lock& lock);
  Buffer& resident(const std::string& name, void* stream, Lock& lock);
  void evict_locked(Buffer& buffer, Lock& lock);
  void restore_locked(Buffer& buffer, void* stream, Lock& lock);
  void* allocate_on_host(std::size_t bytes);
  void check_evictable(const std::string& name, const Buffer& buffer) const;
  void start_eviction(Buffer& buffer, void* host, Event done);
  void finish_eviction(Buffer& buffer, void* host);
  void copy_back(Buffer& buffer, void* stream);
  void finish_return(Buffer& buffer, void* stream);
  bool evict_one(Lock& lock);
  bool may_evict(const Buffer& buffer) const;
  bool is_captured(const Buffer& buffer) const;
  void drop_host_copy(Buffer& buffer) noexcept;

  mutable std::mutex mutex_;
  std::condition_variable moved_;
  const std::unique_ptr<Arena> arena_;
  const SwapOptions swap_;
  void* out_stream_ = nullptr;
  void* in_stream_ = nullptr;
  std::unordered_map<std::string, std::uint64_t> names_;
  std::unordered_map<std::uint64_t, Buffer> buffers_;
  std::unordered_map<void*, std::uint64_t> addresses_;
  std::vector<Orphan> orphans_;
  std::uint64_t next_id_ = 1;
  int schedule_size_ = 0;
  int schedule_at_ = 0;  // index after the one acquired last
  SwapStats swap_stats_;
};

}  // namespace fastgpt
