#include "fastgpt/c_allocator.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "fastgpt/check.h"
#include "fastgpt/fake_upstream.h"

extern "C" void* fastgpt_allocate_0(std::size_t bytes, int device, void* stream);
extern "C" void fastgpt_free_0(void* data, std::size_t bytes, int device, void* stream);

namespace fastgpt {
namespace {

std::shared_ptr<Arena> make_arena() {
  return std::make_shared<Arena>(std::make_shared<FakeUpstream>(FakeUpstream::Options{}), 8 << 20,
                                 ArenaOptions{.handle_bytes = 2 << 20});
}

TEST(CAllocatorTest, AllocatesUnderTheBudgetAndOutlivesItsOwner) {
  auto arena = make_arena();
  const std::weak_ptr<Arena> watched = arena;
  ASSERT_EQ(open_c_allocator(arena), 0);
  void* const data = fastgpt_allocate_0(1000, 0, nullptr);
  ASSERT_NE(data, nullptr);
  EXPECT_EQ(arena->stats().num_blocks, 1u);
  EXPECT_EQ(fastgpt_allocate_0(9 << 20, 0, nullptr), nullptr);
  EXPECT_EQ(fastgpt_allocate_0(1000, 1, nullptr), nullptr) << "another device";
  arena.reset();
  close_c_allocator(0);
  EXPECT_EQ(fastgpt_allocate_0(1000, 0, nullptr), nullptr) << "closed";
  EXPECT_FALSE(watched.expired()) << "a block is live";
  fastgpt_free_0(data, 1000, 0, nullptr);
  EXPECT_TRUE(watched.expired());
  fastgpt_free_0(data, 1000, 0, nullptr);  // late and twice: harmless
}

// Blocks travel between threads, and the last to be freed takes the arena with it.
TEST(CAllocatorTest, FourThreadsFreeEachOthersBlocks) {
  auto arena = make_arena();
  const std::weak_ptr<Arena> watched = arena;
  ASSERT_EQ(open_c_allocator(arena), 0);
  std::atomic<void*> shelf[8] = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&shelf, t] {
      for (int i = 0; i < 5000; ++i) {
        void* const block = fastgpt_allocate_0(std::size_t(256 << (i % 6)), 0, nullptr);
        fastgpt_free_0(shelf[(i + t) % 8].exchange(block), 0, 0, nullptr);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  arena->check_integrity();
  EXPECT_EQ(arena->stats().num_blocks, 8u);
  arena.reset();
  close_c_allocator(0);
  for (std::atomic<void*>& block : shelf) {
    EXPECT_FALSE(watched.expired());
    fastgpt_free_0(block, 0, 0, nullptr);
  }
  EXPECT_TRUE(watched.expired());
}

TEST(CAllocatorTest, ManyPoolsShareTheSlotsAndTheLastOneIsRefused) {
  std::vector<int> slots;
  for (int i = 0; i < kNumCAllocators; ++i) slots.push_back(open_c_allocator(make_arena()));
  EXPECT_THROW(open_c_allocator(make_arena()), InvalidArgument);
  close_c_allocator(slots[3]);
  EXPECT_EQ(open_c_allocator(make_arena()), slots[3]);
  for (const int slot : slots) close_c_allocator(slot);
  EXPECT_THROW(close_c_allocator(kNumCAllocators), InvalidArgument);
}

}  // namespace
}  // namespace fastgpt
