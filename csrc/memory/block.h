// One block of an arena: what the heap, the lanes and the fences know of it.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fastgpt::memory {

/// Work that must be over before a block is written again: all that the streams of the set bits
/// (slots of a StreamOrder) had queued at `tick`. One tick serves every bit, so that merging two
/// fences never loses one; the stream's own last tick narrows it down again.
struct Fence {
  std::uint64_t tick = 0;
  std::uint32_t streams = 0;
};

enum class State : std::uint8_t {
  kFree,     // in the heap's index, physical memory under every byte
  kLive,     // handed out
  kLane,     // freed, kept aside by a lane or on its way there
  kEvicted,  // handed out, its bytes elsewhere; physical memory may be missing
  kVoid,     // address space without physical memory
};

/// 64 bytes, one cache line. `prev` and `next` are neighbours by address within one slab.
struct alignas(64) Block {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  Block* prev = nullptr;
  Block* next = nullptr;
  union {
    std::size_t index;      // kFree: place in the list of its size
    std::size_t requested;  // kLive, kEvicted
  };
  std::uint64_t tick = 0;     // kFree: the fence's
  std::uint32_t streams = 0;  // kFree: the fence's; kLive: other streams that use it
  // Atomic because a lane changes kLive and kLane while the heap looks at its neighbours.
  std::atomic<State> state{State::kVoid};

  Block() : requested(0) {}
  std::byte* end() const { return data + bytes; }
  bool is(State wanted) const { return state.load(std::memory_order_relaxed) == wanted; }
  void set(State next_state) { state.store(next_state, std::memory_order_relaxed); }
  Fence fence() const { return {tick, streams}; }
};

static_assert(sizeof(Block) == 64, "a block's metadata is one cache line");

}  // namespace fastgpt::memory
