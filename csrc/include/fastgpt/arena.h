// Level 1 of the memory pool: blocks carved from slabs that never move.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "fastgpt/upstream.h"

namespace fastgpt {

constexpr std::size_t kArenaAlignment = 256;

/// Byte counts of an arena. At all times:
///     reserved = allocated + free,    allocated = requested + rounding.
struct ArenaStats {
  std::size_t budget_bytes = 0;          // reserved never exceeds it
  std::size_t reserved_bytes = 0;        // held from upstream
  std::size_t allocated_bytes = 0;       // handed out, rounded up to kArenaAlignment
  std::size_t requested_bytes = 0;       // handed out, as asked for
  std::size_t largest_free_bytes = 0;    // the largest request served without growing
  std::size_t peak_allocated_bytes = 0;  // since the last reset_peaks
  std::size_t peak_reserved_bytes = 0;
  std::size_t num_slabs = 0;
  std::size_t num_blocks = 0;         // live
  std::uint64_t num_allocations = 0;  // ever
  std::uint64_t num_upstream_calls = 0;

  /// 1 - peak allocated / peak reserved: the share of the device's memory held for nothing at
  /// the worst moment. 0 for an arena that never reserved.
  double fragmentation() const {
    if (peak_reserved_bytes == 0) return 0.0;
    return 1.0 - double(peak_allocated_bytes) / double(peak_reserved_bytes);
  }
};

/// Best-fit allocator over slabs with immediate coalescing. Pointers stay valid until freed.
/// Thread-safe. A block is handed to another stream only after the stream that freed it is done.
class Arena {
 public:
  /// @param budget_bytes limit of what is held from upstream.
  /// @param slab_bytes least size of a slab; smaller when the budget leaves less.
  Arena(std::shared_ptr<Upstream> upstream, std::size_t budget_bytes,
        std::size_t slab_bytes = std::size_t{64} << 20);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// @return a block of at least `bytes`, aligned to 256; a block of 0 bytes is legal.
  /// @throws OutOfMemory if budget or device have no room for it.
  void* allocate(std::size_t bytes, void* stream);

  /// Return a block; `stream` is the last to use it. @throws InvalidArgument if not live.
  void free(void* data, void* stream);

  /// Enlarge a live block without moving it. @return false if its neighbour is taken or too small.
  bool grow(void* data, std::size_t bytes, void* stream);

  /// Give slabs without a live block back to upstream. @return bytes given back.
  std::size_t trim();

  /// Bytes usable in the block at `data`. @throws InvalidArgument if not live.
  std::size_t block_bytes(const void* data) const;

  ArenaStats stats() const;
  void reset_peaks();
  Upstream& upstream() { return *upstream_; }

  /// Verify every invariant; for tests. @throws Error naming the first that does not hold.
  void check_integrity() const;

 private:
  struct Block {
    std::size_t bytes;
    std::size_t requested;
    bool is_free;
    bool starts_slab;
    void* stream;  // last user of a free block
  };
  using Blocks = std::map<std::byte*, Block>;

  Blocks::iterator find_live(const void* data);
  Blocks::iterator add_slab(std::size_t bytes);
  void take(Blocks::iterator block, std::size_t bytes, std::size_t requested, void* stream);
  void insert_free(Blocks::iterator block);
  void erase_free(Blocks::iterator block);
  void note_peaks();
  std::size_t trim_locked();

  const std::shared_ptr<Upstream> upstream_;
  const std::size_t slab_bytes_;
  mutable std::mutex mutex_;
  Blocks blocks_;                                         // by address, over all slabs
  std::set<std::pair<std::size_t, std::byte*>> by_size_;  // free blocks
  ArenaStats stats_;
};

}  // namespace fastgpt
