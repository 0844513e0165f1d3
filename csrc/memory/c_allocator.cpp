#include "fastgpt/c_allocator.h"

#include <array>
#include <atomic>
#include <mutex>
#include <utility>

#include "fastgpt/check.h"
#include "memory/spin_lock.h"

namespace fastgpt {
namespace {

using memory::SpinLock;

// A pair of calls takes the lock twice, and no count of a shared_ptr changes: on a host where a
// locked instruction costs 15 ns, thirteen of them were most of a pair.
struct Slot {
  std::shared_ptr<Arena> arena;  // null: the slot is free
  // The same without the lock: whose block is being freed keeps it. Null when the slot is free.
  std::atomic<Arena*> current{nullptr};
  int device = 0;
  bool is_open = false;
  std::size_t num_blocks = 0;
};

struct Slots {
  SpinLock mutex;
  std::array<Slot, kNumCAllocators> slots;
};

// Never destroyed: a caching allocator may give blocks back while the process ends.
Slots& all() {
  static Slots* const slots = new Slots;
  return *slots;
}

std::shared_ptr<Arena> forget_if_done(Slot& slot) {
  if (slot.is_open || slot.num_blocks > 0) return nullptr;
  slot.current = nullptr;
  return std::exchange(slot.arena, nullptr);
}

// One block is less in the slot.
void count_out(Slot& slot) {
  std::shared_ptr<Arena> last;  // destroyed after the lock is open
  std::lock_guard lock(all().mutex);
  --slot.num_blocks;
  last = forget_if_done(slot);
}

void* allocate(int index, std::size_t bytes, int device, void* stream) noexcept {
  Slots& table = all();
  Slot& slot = table.slots[std::size_t(index)];
  {
    std::lock_guard lock(table.mutex);
    if (!slot.is_open || slot.device != device) return nullptr;
    ++slot.num_blocks;  // from here on the arena stays
  }
  try {
    return slot.current.load(std::memory_order_relaxed)->allocate(bytes, stream);
  } catch (const std::exception&) {  // the caller knows one failure: no memory
  }
  count_out(slot);
  return nullptr;
}

void free_block(int index, void* data, void* stream) noexcept {
  if (data == nullptr) return;
  Slot& slot = all().slots[std::size_t(index)];
  Arena* const arena = slot.current.load(std::memory_order_acquire);
  if (arena == nullptr) return;
  try {
    arena->free(data, stream);
  } catch (const std::exception&) {  // not a block of ours: there is nothing to give back
    return;
  }
  count_out(slot);
}

}  // namespace

int open_c_allocator(std::shared_ptr<Arena> arena) {
  Slots& table = all();
  std::lock_guard lock(table.mutex);
  for (int i = 0; i < kNumCAllocators; ++i) {
    Slot& slot = table.slots[std::size_t(i)];
    if (slot.arena != nullptr) continue;
    slot.device = arena->upstream().device();
    slot.current = arena.get();
    slot.arena = std::move(arena);
    slot.is_open = true;
    slot.num_blocks = 0;
    return i;
  }
  detail::fail<InvalidArgument>(__FILE__, __LINE__, "all ", kNumCAllocators,
                                " allocators for other libraries are in use; drop a MemPool and "
                                "its tensors first");
}

void close_c_allocator(int index) {
  FASTGPT_CHECK(index >= 0 && index < kNumCAllocators, "slot is ", index, "; expected 0 to ",
                kNumCAllocators - 1);
  Slots& table = all();
  std::shared_ptr<Arena> last;
  std::lock_guard lock(table.mutex);
  Slot& slot = table.slots[std::size_t(index)];
  slot.is_open = false;
  last = forget_if_done(slot);
}

}  // namespace fastgpt

#define FASTGPT_C_ALLOCATOR(N)                                                         \
  extern "C" void* fastgpt_allocate_##N(std::size_t bytes, int device, void* stream) { \
    return fastgpt::allocate(N, bytes, device, stream);                                \
  }                                                                                    \
  extern "C" void fastgpt_free_##N(void* data, std::size_t, int, void* stream) {       \
    fastgpt::free_block(N, data, stream);                                              \
  }

FASTGPT_C_ALLOCATOR(0)
FASTGPT_C_ALLOCATOR(1)
FASTGPT_C_ALLOCATOR(2)
FASTGPT_C_ALLOCATOR(3)
FASTGPT_C_ALLOCATOR(4)
FASTGPT_C_ALLOCATOR(5)
FASTGPT_C_ALLOCATOR(6)
FASTGPT_C_ALLOCATOR(7)
FASTGPT_C_ALLOCATOR(8)
FASTGPT_C_ALLOCATOR(9)
FASTGPT_C_ALLOCATOR(10)
FASTGPT_C_ALLOCATOR(11)
FASTGPT_C_ALLOCATOR(12)
FASTGPT_C_ALLOCATOR(13)
FASTGPT_C_ALLOCATOR(14)
FASTGPT_C_ALLOCATOR(15)
