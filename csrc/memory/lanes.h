// Small blocks kept aside per thread and stream, so that threads do not meet at the arena's lock.
#pragma once
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "memory/block.h"
#include "memory/heap.h"
#include "memory/spin_lock.h"

namespace fastgpt::memory {

/// A lane holds freed blocks by exact size, at most kDepth of each and kMaxBytes in all, for the
/// stream that freed them: taking one back needs no wait and wastes no byte. A full lane gives all
/// it has to the heap, and every lane does when memory runs short.
class Lanes {
 public:
  static constexpr std::size_t kMaxBlockBytes = 32 << 10;

  /// @return a block of exactly `bytes`, now live, or nullptr.
  Block* pop(void* stream, std::size_t bytes, std::size_t requested);

  /// Keep a block in state kLane that was freed on `stream`; what the lane has no room for any
  /// more goes to `give(block)`. @return false when the lane belongs to another stream.
  template <class Give>
  bool push(void* stream, Block* block, Give give) {
    Lane& lane = this->lane(stream);
    std::lock_guard lock(lane.mutex);
    if (lane.bytes == 0) lane.stream = stream;
    if (lane.stream != stream) return false;
    Stack& stack = lane.stacks[block->bytes / kGranule - 1];
    if (stack.size == kDepth) {
      const std::size_t requested = block->requested;
      const std::size_t bytes = block->bytes;
      give(block);
      count(lane, requested, bytes, -1);
      return true;
    }
    if (lane.bytes + block->bytes > kMaxBytes) empty(lane, give);
    count(lane, block->requested, block->bytes, -1);
    stack.blocks[stack.size++] = block;
    lane.bytes += block->bytes;
    return true;
  }

  /// Empty every lane, or those of one stream, into `give(block, stream)`.
  template <class Give>
  void flush(Give give, void* const* only = nullptr) {
    for (Lane& lane : lanes_) {
      std::lock_guard lock(lane.mutex);
      if (only != nullptr && lane.stream != *only) continue;
      empty(lane, [&](Block* block) { give(block, lane.stream); });
    }
  }

  /// What lanes added to and took from the live blocks, exact while all lanes are locked.
  struct Counts {
    std::int64_t requested = 0;
    std::int64_t allocated = 0;
    std::int64_t blocks = 0;
    std::uint64_t allocations = 0;
    std::size_t kept = 0;
  };
  std::vector<std::unique_lock<SpinLock>> lock_all();
  Counts counts() const;  // all lanes locked

  /// counts().requested up to kPublishBytes a lane, without a lock: for peaks.
  std::int64_t published() const { return published_.load(std::memory_order_relaxed); }

 private:
  static constexpr int kNumLanes = 32;
  static constexpr int kDepth = 8;
  static constexpr std::size_t kMaxBytes = 1 << 20;
  static constexpr std::int64_t kPublishBytes = 64 << 10;

  struct Stack {
    int size = 0;
    std::array<Block*, kDepth> blocks{};
  };
  struct alignas(64) Lane {
    SpinLock mutex;
    void* stream = nullptr;
    std::size_t bytes = 0;
    Counts counts;
    std::int64_t unpublished = 0;
    std::array<Stack, kMaxBlockBytes / kGranule> stacks;
  };

  template <class Give>
  static void empty(Lane& lane, Give give) {
    for (Stack& stack : lane.stacks) {
      while (stack.size > 0) {
        Block* const block = stack.blocks[stack.size - 1];
        const std::size_t bytes = block->bytes;
        give(block);  // may throw: then the lane keeps it
        --stack.size;
        lane.bytes -= bytes;
      }
    }
  }

  Lane& lane(void* stream);
  void count(Lane& lane, std::size_t requested, std::size_t bytes, int sign);

  std::array<Lane, kNumLanes> lanes_;
  std::atomic<std::int64_t> published_{0};
};

}  // namespace fastgpt::memory
