// Level 1 of the memory pool: blocks of memory that never move, in stream order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "fastgpt/trace.h"
#include "fastgpt/upstream.h"

namespace fastgpt {

constexpr std::size_t kArenaAlignment = 256;

struct ArenaOptions {
  std::size_t handle_bytes = std::size_t{64} << 20;  // physical memory comes in pieces of this
  std::size_t ahead_bytes = 0;  // keep this much committed ahead of need, by a thread of its own
  bool use_lanes = true;        // keep small freed blocks per thread and stream
};

/// Byte counts of an arena, exact at every moment:
///     reserved = requested + rounding + pending + returnable + scattered + lane + evicted
struct ArenaStats {
  std::size_t budget_bytes = 0;          // reserved never exceeds it
  std::size_t reserved_bytes = 0;        // physical memory held
  std::size_t allocated_bytes = 0;       // handed out: requested + rounding
  std::size_t requested_bytes = 0;       // handed out, as asked for
  std::size_t rounding_bytes = 0;        // handed out beyond what was asked for
  std::size_t pending_bytes = 0;         // free, a stream may still be using it
  std::size_t returnable_bytes = 0;      // free, in handles without anything else
  std::size_t scattered_bytes = 0;       // free, in handles that are partly used
  std::size_t lane_bytes = 0;            // free, kept aside for one thread and stream
  std::size_t evicted_bytes = 0;         // under evicted blocks, in handles that are partly used
  std::size_t ahead_bytes = 0;           // of the free bytes: never handed out yet
  std::size_t largest_free_bytes = 0;    // the largest request served without growing
  std::size_t peak_requested_bytes = 0;  // since the last reset_peaks; lanes within 2 MiB
  std::size_t peak_allocated_bytes = 0;
  std::size_t peak_reserved_bytes = 0;
  std::size_t peak_touched_bytes = 0;  // peak of reserved - ahead
  std::size_t num_slabs = 0;           // handles, or fixed slabs
  std::size_t num_blocks = 0;          // live
  std::uint64_t num_allocations = 0;   // ever
  std::uint64_t num_upstream_calls = 0;
  std::uint64_t num_stream_waits = 0;  // another stream had to wait
  std::uint64_t num_event_records = 0;

  /// 1 - peak requested / peak reserved: the share of the device's memory held for nothing over
  /// the window. 0 for an arena that never reserved.
  double fragmentation() const {
    if (peak_reserved_bytes == 0) return 0.0;
    return 1.0 - double(peak_requested_bytes) / double(peak_reserved_bytes);
  }
  /// (rounding + scattered) / reserved: what cannot be given back or moved now.
  double fragmentation_now() const {
    if (reserved_bytes == 0) return 0.0;
    return double(rounding_bytes + scattered_bytes) / double(reserved_bytes);
  }
};

/// One block, for snapshots.
struct BlockInfo {
  enum class Kind { kFree, kPending, kLive, kLane, kEvicted };
  std::uintptr_t address = 0;
  std::size_t bytes = 0;
  std::size_t requested_bytes = 0;
  Kind kind = Kind::kFree;
};

/// One run of physical memory and the blocks in it.
struct SegmentInfo {
  std::uintptr_t address = 0;
  std::size_t bytes = 0;
  std::vector<BlockInfo> blocks;
};

/// Constant-time good-fit allocator with immediate coalescing. Pointers stay valid until freed,
/// whatever grows, and evicted blocks keep their address. Any thread may call any method.
///
/// Stream order: a block is free for the stream that freed it at once, and for another stream
/// after it was made to wait for the first; the host never waits. Where a stream is being
/// captured into a graph it can reuse only its own memory and memory that nobody uses.
///
/// Where upstream can map, the arena grows inside one reservation of address space; else by
/// slabs. A driver call that fails leaves the arena as it was.
class Arena {
 public:
  /// @param budget_bytes limit of the physical memory held.
  Arena(std::shared_ptr<Upstream> upstream, std::size_t budget_bytes, ArenaOptions options = {});
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// @return a block of at least `bytes`, aligned to 256; a block of 0 bytes is legal.
  /// @throws OutOfMemory if budget or device have no room for it.
  void* allocate(std::size_t bytes, void* stream);

  /// Return a block; `stream` is the last to use it. @throws InvalidArgument if not live.
  void free(void* data, void* stream);

  /// Return a block that no stream used but those of record_use.
  void free_recorded(void* data);

  /// Say that `stream`, too, uses a live block: whoever gets the memory next waits for it.
  void record_use(void* data, void* stream);

  /// Forget a stream before it is destroyed; blocks freed on it stay safe.
  void release_stream(void* stream);

  /// Enlarge a live block without moving it. @return false if its neighbour is taken or too small.
  bool grow(void* data, std::size_t bytes, void* stream);

  /// Give physical memory that nobody uses back, as far as whole handles allow. @return bytes.
  std::size_t trim();

  /// Take the physical memory from under a live block, as far as whole handles allow; its address
  /// stays taken. The caller has saved the content and knows that no stream uses the block.
  /// @throws InvalidArgument if it is not live.
  void evict(void* data);
  /// Put physical memory, of undefined content, under an evicted block again.
  /// @throws OutOfMemory if budget or device have no room; InvalidArgument if it is not evicted.
  void restore(void* data);

  /// Whether evict is possible: the arena maps its memory.
  bool can_evict() const;

  /// Bytes usable in the block at `data`. @throws InvalidArgument if not live.
  std::size_t block_bytes(const void* data) const;

  ArenaStats stats() const;
  std::vector<SegmentInfo> snapshot() const;
  void reset_peaks();
  Upstream& upstream() { return *upstream_; }
  Trace& trace() { return trace_; }

  /// Verify every invariant; for tests. @throws Error naming the first that does not hold.
  void check_integrity() const;

 private:
  struct Impl;
  void free_block(void* data, void* const* stream);
  const std::shared_ptr<Upstream> upstream_;
  Trace trace_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fastgpt
