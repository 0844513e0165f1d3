#include "fastgpt/arena.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>

#include "memory/fake_upstream.h"

namespace fastgpt {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

struct ArenaTest : ::testing::Test {
  std::shared_ptr<test::FakeUpstream> upstream = std::make_shared<test::FakeUpstream>(64 * kMiB);
  Arena arena{upstream, 16 * kMiB, kMiB};
  void* stream_a = reinterpret_cast<void*>(std::uintptr_t{1});
  void* stream_b = reinterpret_cast<void*>(std::uintptr_t{2});
};

TEST_F(ArenaTest, BlocksAreAlignedAndCoalesceToTheWholeSlab) {
  void* blocks[3];
  for (void*& block : blocks) block = arena.allocate(1000, nullptr);
  for (void* block : blocks) EXPECT_EQ(std::uintptr_t(block) % kArenaAlignment, 0U);
  for (const int i : {1, 0, 2}) arena.free(blocks[i], nullptr);
  EXPECT_EQ(arena.stats().largest_free_bytes, kMiB);
  arena.check_integrity();
}

TEST_F(ArenaTest, StatsIdentityHolds) {
  void* block = arena.allocate(1, nullptr);
  const ArenaStats stats = arena.stats();
  EXPECT_EQ(stats.requested_bytes, 1U);
  EXPECT_EQ(stats.allocated_bytes, kArenaAlignment);
  EXPECT_EQ(stats.reserved_bytes, kMiB);
  EXPECT_DOUBLE_EQ(stats.fragmentation(), 1.0 - 256.0 / double(kMiB));
  arena.free(block, nullptr);
}

TEST_F(ArenaTest, FreeTwiceThrows) {
  void* block = arena.allocate(10, nullptr);
  arena.free(block, nullptr);
  EXPECT_THROW(arena.free(block, nullptr), InvalidArgument);
  EXPECT_THROW(arena.free(&arena, nullptr), InvalidArgument);
}

TEST_F(ArenaTest, BudgetHoldsAndOutOfMemoryLeavesTheArenaWhole) {
  void* block = arena.allocate(10 * kMiB, nullptr);
  EXPECT_THROW(arena.allocate(10 * kMiB, nullptr), OutOfMemory);
  arena.check_integrity();
  arena.free(block, nullptr);
  EXPECT_NO_THROW(arena.allocate(16 * kMiB, nullptr));  // empty slabs are given back first
}

TEST_F(ArenaTest, UpstreamFailureIsOutOfMemoryAndCountsStayTrue) {
  upstream->fail_next = true;
  EXPECT_NO_THROW(arena.allocate(1000, nullptr));  // the second, smaller try succeeds
  Arena starved(std::make_shared<test::FakeUpstream>(100), kMiB, kMiB);
  EXPECT_THROW(starved.allocate(1000, nullptr), OutOfMemory);
  EXPECT_EQ(starved.stats().reserved_bytes, 0U);
  starved.check_integrity();
}

TEST_F(ArenaTest, AnotherStreamWaitsForTheOneThatFreed) {
  arena.free(arena.allocate(kMiB, stream_a), stream_a);
  void* block = arena.allocate(kMiB, stream_a);
  EXPECT_TRUE(upstream->waits.empty());
  arena.free(block, stream_a);
  arena.allocate(kMiB, stream_b);
  EXPECT_EQ(upstream->waits, std::vector<void*>{stream_a});
}

TEST_F(ArenaTest, MergedBlocksOfTwoStreamsForgetNeither) {
  void* first = arena.allocate(kMiB / 2, stream_a);
  void* second = arena.allocate(kMiB / 2, stream_b);
  arena.free(first, stream_a);
  arena.free(second, stream_b);
  arena.allocate(kMiB, reinterpret_cast<void*>(std::uintptr_t{3}));
  EXPECT_EQ(upstream->waits.size(), 2U);
}

TEST_F(ArenaTest, GrowStaysInPlaceOrRefuses) {
  void* block = arena.allocate(1000, nullptr);
  EXPECT_TRUE(arena.grow(block, 5000, nullptr));
  EXPECT_GE(arena.block_bytes(block), 5000U);
  void* neighbour = arena.allocate(1000, nullptr);
  EXPECT_FALSE(arena.grow(block, 50000, nullptr));
  arena.check_integrity();
  arena.free(neighbour, nullptr);
  EXPECT_TRUE(arena.grow(block, 50000, nullptr));
}

TEST_F(ArenaTest, RandomOperationsKeepEveryInvariant) {
  std::mt19937 rng(7);
  std::vector<std::pair<unsigned char*, std::size_t>> live;
  for (int step = 0; step < 20000; ++step) {
    if (!live.empty() && rng() % 100 < 48) {
      const std::size_t i = rng() % live.size();
      const auto [data, bytes] = live[i];
      const auto stamp = static_cast<unsigned char>(std::uintptr_t(data) >> 8);
      ASSERT_EQ(data[0], stamp);
      ASSERT_EQ(data[bytes - 1], stamp);
      arena.free(data, nullptr);
      live[i] = live.back();
      live.pop_back();
    } else {
      const std::size_t bytes = 1 + rng() % (rng() % 10 == 0 ? 200000 : 3000);
      try {
        auto* data = static_cast<unsigned char*>(arena.allocate(bytes, nullptr));
        data[0] = data[bytes - 1] = static_cast<unsigned char>(std::uintptr_t(data) >> 8);
        live.emplace_back(data, bytes);
      } catch (const OutOfMemory&) {
        ASSERT_GT(arena.stats().allocated_bytes, 8 * kMiB);
      }
    }
    if (step % 100 == 0) arena.check_integrity();
  }
  for (const auto& [data, bytes] : live) arena.free(data, nullptr);
  arena.trim();
  EXPECT_EQ(upstream->num_live(), 0U);
}

}  // namespace
}  // namespace fastgpt
