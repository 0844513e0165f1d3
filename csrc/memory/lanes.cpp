#include "memory/lanes.h"

namespace fastgpt::memory {

Lanes::Lane& Lanes::lane(void* stream) {
  static std::atomic<std::uint32_t> num_threads{0};
  thread_local const std::uint32_t thread = num_threads.fetch_add(1);
  const auto handle = std::uint64_t(reinterpret_cast<std::uintptr_t>(stream));
  return lanes_[(thread + ((handle >> 4) * 0x9E3779B97F4A7C15U >> 59)) % kNumLanes];
}

void Lanes::count(Lane& lane, std::size_t requested, std::size_t bytes, int sign) {
  const auto added = sign * std::int64_t(requested);
  lane.counts.requested += added;
  lane.counts.allocated += sign * std::int64_t(bytes);
  lane.counts.blocks += sign;
  lane.unpublished += added;
  if (lane.unpublished > kPublishBytes || lane.unpublished < -kPublishBytes) {
    published_.fetch_add(lane.unpublished, std::memory_order_relaxed);
    lane.unpublished = 0;
  }
}

Block* Lanes::pop(void* stream, std::size_t bytes, std::size_t requested) {
  Lane& lane = this->lane(stream);
  std::lock_guard lock(lane.mutex);
  Stack& stack = lane.stacks[bytes / kGranule - 1];
  if (lane.stream != stream || stack.size == 0) return nullptr;
  Block* block = stack.blocks[--stack.size];
  lane.bytes -= bytes;
  block->requested = requested;
  ++lane.counts.allocations;
  count(lane, requested, bytes, 1);
  block->set(State::kLive);
  return block;
}

std::vector<std::unique_lock<SpinLock>> Lanes::lock_all() {
  std::vector<std::unique_lock<SpinLock>> locks;
  locks.reserve(kNumLanes);
  for (Lane& lane : lanes_) locks.emplace_back(lane.mutex);
  return locks;
}

Lanes::Counts Lanes::counts() const {
  Counts total;
  for (const Lane& lane : lanes_) {
    total.requested += lane.counts.requested;
    total.allocated += lane.counts.allocated;
    total.blocks += lane.counts.blocks;
    total.allocations += lane.counts.allocations;
    total.kept += lane.bytes;
  }
  return total;
}

}  // namespace fastgpt::memory
