#include "fastgpt/arena.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <random>
#include <thread>

#include "fastgpt/fake_upstream.h"

namespace fastgpt {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

void* stream(std::uintptr_t id) { return reinterpret_cast<void*>(id); }

std::shared_ptr<FakeUpstream> make_fake(std::size_t capacity, bool can_map = true,
                                        std::uint64_t seed = 0) {
  return std::make_shared<FakeUpstream>(FakeUpstream::Options{capacity, can_map, kMiB, seed});
}

// Every contract holds where memory is mapped and where it comes in fixed slabs.
struct ArenaTest : ::testing::TestWithParam<bool> {
  std::shared_ptr<FakeUpstream> upstream = make_fake(64 * kMiB, GetParam());
  Arena arena{upstream, 16 * kMiB, {.handle_bytes = 2 * kMiB, .use_lanes = false}};
  void* a = stream(1);
  void* b = stream(2);

  ~ArenaTest() override {
    arena.check_integrity();
    upstream->run_all();
    EXPECT_TRUE(upstream->violations().empty()) << upstream->violations().front();
  }
};
INSTANTIATE_TEST_SUITE_P(Memory, ArenaTest, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Mapped" : "Slabs"; });

TEST_P(ArenaTest, BlocksAreAlignedAndCoalesce) {
  void* blocks[3];
  for (void*& block : blocks) block = arena.allocate(1000, a);
  for (void* block : blocks) EXPECT_EQ(std::uintptr_t(block) % kArenaAlignment, 0U);
  for (const int i : {1, 0, 2}) arena.free(blocks[i], a);
  EXPECT_EQ(arena.stats().largest_free_bytes, 2 * kMiB);
}

TEST_P(ArenaTest, StatsIdentityHolds) {
  void* block = arena.allocate(1, a);
  const ArenaStats stats = arena.stats();
  EXPECT_EQ(stats.requested_bytes, 1U);
  EXPECT_EQ(stats.rounding_bytes, kArenaAlignment - 1);
  EXPECT_EQ(stats.reserved_bytes, 2 * kMiB);
  EXPECT_EQ(stats.scattered_bytes, 2 * kMiB - kArenaAlignment);
  EXPECT_DOUBLE_EQ(stats.fragmentation(), 1.0 - 1.0 / double(2 * kMiB));
  arena.free(block, a);
  EXPECT_EQ(arena.stats().pending_bytes, 2 * kMiB);
  upstream->run_all();
  EXPECT_EQ(arena.stats().returnable_bytes, 2 * kMiB);
  EXPECT_EQ(Arena(upstream, kMiB).stats().fragmentation(), 0.0);
}

TEST_P(ArenaTest, FreeTwiceThrows) {
  void* block = arena.allocate(10, a);
  arena.free(block, a);
  EXPECT_THROW(arena.free(block, a), InvalidArgument);
  EXPECT_THROW(arena.free(&arena, a), InvalidArgument);
}

TEST_P(ArenaTest, BudgetHoldsAndOutOfMemoryLeavesTheArenaWhole) {
  void* block = arena.allocate(10 * kMiB, a);
  EXPECT_THROW(arena.allocate(10 * kMiB, a), OutOfMemory);
  arena.check_integrity();
  arena.free(block, a);
  EXPECT_NO_THROW(arena.allocate(16 * kMiB, a));  // free memory is given back or joined first
  EXPECT_EQ(upstream->mapped_bytes(), 16 * kMiB);
  EXPECT_THROW(arena.allocate(1, a), OutOfMemory);
  EXPECT_THROW(arena.allocate(~std::size_t{0}, a), InvalidArgument);
}

TEST_P(ArenaTest, DeviceWithoutMemoryIsOutOfMemory) {
  Arena starved(make_fake(kMiB, GetParam()), 8 * kMiB, {.handle_bytes = 2 * kMiB});
  EXPECT_NO_THROW(starved.allocate(1000, a));  // less than a handle is left: take that
  EXPECT_THROW(starved.allocate(kMiB, a), OutOfMemory);
  starved.check_integrity();
}

TEST_P(ArenaTest, SameStreamReusesWithoutAWaitAnotherWaitsOnce) {
  void* block = arena.allocate(kMiB, a);
  arena.free(block, a);
  EXPECT_EQ(arena.allocate(kMiB, a), block);
  EXPECT_EQ(arena.stats().num_stream_waits, 0U);
  upstream->expect(block, 0, 0, a);
  arena.free(block, a);
  EXPECT_EQ(arena.allocate(kMiB, b), block);
  EXPECT_EQ(arena.stats().num_stream_waits, 1U);
}

TEST_P(ArenaTest, OneEventCoversAHundredFrees) {
  std::vector<void*> blocks;
  for (int i = 0; i < 100; ++i) blocks.push_back(arena.allocate(10000, a));
  for (void* block : blocks) arena.free(block, a);
  for (int i = 0; i < 100; ++i) arena.allocate(10000, b);
  EXPECT_EQ(arena.stats().num_event_records, 1U);
  EXPECT_EQ(arena.stats().num_stream_waits, 1U);
}

TEST_P(ArenaTest, MergedBlocksOfTwoStreamsForgetNeither) {
  void* first = arena.allocate(kMiB, a);
  void* second = arena.allocate(kMiB, b);
  upstream->write(first, kMiB, 1, a);
  upstream->expect(first, kMiB, 1, a);
  upstream->write(second, kMiB, 2, b);
  upstream->expect(second, kMiB, 2, b);
  arena.free(first, a);
  arena.free(second, b);
  void* both = arena.allocate(2 * kMiB, stream(3));
  EXPECT_EQ(both, first);
  upstream->write(both, 2 * kMiB, 3, stream(3));
  EXPECT_EQ(arena.stats().num_stream_waits, 2U);
}

TEST_P(ArenaTest, RecordedUseIsWaitedFor) {
  void* block = arena.allocate(2 * kMiB, a);
  upstream->write(block, 2 * kMiB, 1, a);
  upstream->synchronize_device();
  upstream->expect(block, 2 * kMiB, 1, b);
  arena.record_use(block, b);
  arena.free(block, a);
  EXPECT_EQ(arena.allocate(2 * kMiB, a), block);
  upstream->write(block, 2 * kMiB, 2, a);
  EXPECT_EQ(arena.stats().num_stream_waits, 1U);
  EXPECT_THROW(arena.record_use(&arena, a), InvalidArgument);
}

TEST_P(ArenaTest, ReleasedStreamStaysSafeAndItsHandleMayComeBack) {
  void* block = arena.allocate(2 * kMiB, a);
  upstream->write(block, 2 * kMiB, 1, a);
  upstream->expect(block, 2 * kMiB, 1, a);
  arena.free(block, a);
  arena.release_stream(a);
  // The same handle is a new stream now: it must wait for the old one.
  EXPECT_EQ(arena.allocate(2 * kMiB, a), block);
  EXPECT_EQ(arena.stats().num_stream_waits, 1U);
}

TEST_P(ArenaTest, MoreStreamsThanSlots) {
  for (std::uintptr_t i = 1; i <= 100; ++i) {
    void* block = arena.allocate(kMiB, stream(i));
    upstream->write(block, kMiB, std::uint8_t(i), stream(i));
    upstream->expect(block, kMiB, std::uint8_t(i), stream(i));
    arena.free(block, stream(i));
  }
}

TEST_P(ArenaTest, CapturingStreamReusesItsOwnAndRefusesForeignMemory) {
  arena.free(arena.allocate(16 * kMiB, a), a);
  upstream->begin_capture(a);
  EXPECT_NO_THROW(arena.free(arena.allocate(16 * kMiB, a), a));
  upstream->end_capture(a);
  upstream->begin_capture(b);
  EXPECT_THROW(arena.allocate(16 * kMiB, b), DeviceError);
  upstream->end_capture(b);
  EXPECT_NO_THROW(arena.allocate(16 * kMiB, b));
}

TEST_P(ArenaTest, GrowStaysInPlaceOrRefuses) {
  void* block = arena.allocate(1000, a);
  EXPECT_TRUE(arena.grow(block, 5000, a));
  EXPECT_GE(arena.block_bytes(block), 5000U);
  void* neighbour = arena.allocate(1000, a);
  EXPECT_FALSE(arena.grow(block, 50000, a));
  arena.check_integrity();
  arena.free(neighbour, b);
  EXPECT_TRUE(arena.grow(block, 50000, a));
  EXPECT_EQ(arena.stats().num_stream_waits, 1U);
}

TEST_P(ArenaTest, TrimReturnsWholeHandlesOnly) {
  void* small = arena.allocate(1000, a);
  void* large = arena.allocate(9 * kMiB, a);
  arena.free(large, a);
  EXPECT_GE(arena.trim(), GetParam() ? 8 * kMiB : 9 * kMiB);
  EXPECT_EQ(arena.stats().reserved_bytes, upstream->mapped_bytes());
  arena.free(small, a);
  arena.trim();
  EXPECT_EQ(upstream->mapped_bytes(), 0U);
}

/// How the fake driver fails: `num` calls in a row, by throwing or by refusing.
struct Failing {
  std::uint64_t num;
  bool throws;
};
constexpr Failing kFailings[] = {{1, false}, {1, true}, {1000, false}, {1000, true}};

// Each driver call of a script fails once, in each way; what failed can be done again.
TEST_P(ArenaTest, EveryDriverCallMayFail) {
  for (const auto [num, throws] : kFailings) {
    for (std::uint64_t k = 1;; ++k) {
      ASSERT_LT(k, 1000U);
      auto fake = make_fake(64 * kMiB, GetParam());
      Arena fragile(fake, 12 * kMiB, {.handle_bytes = 2 * kMiB, .use_lanes = false});
      bool failed = false;
      const auto attempt = [&](auto act) {
        const ArenaStats was = fragile.stats();
        fake->fail_at(failed ? 0 : k, num, throws);
        const std::uint64_t before = fake->num_calls();
        bool done = true;
        try {
          act();
        } catch (const Error&) {
          done = false;
        }
        const bool reached = fake->num_calls() >= before + k;
        if (!failed && !reached) k -= fake->num_calls() - before;  // it may be a later call's turn
        fake->fail_at(0);
        fragile.check_integrity();
        EXPECT_EQ(fragile.stats().reserved_bytes, fake->mapped_bytes()) << "call " << k;
        EXPECT_EQ(64 * kMiB - fake->free_bytes(), fake->mapped_bytes()) << "call " << k;
        if (!done) {
          failed = true;
          EXPECT_EQ(fragile.stats().requested_bytes, was.requested_bytes) << "call " << k;
          EXPECT_EQ(fragile.stats().num_blocks, was.num_blocks) << "call " << k;
          act();
        } else if (reached) {
          failed = true;  // and was made good
        }
      };
      const std::uint64_t asked = k;
      void* first = nullptr;
      void* second = nullptr;
      void* third = nullptr;
      attempt([&] { first = fragile.allocate(1 * kMiB, a); });
      attempt([&] { second = fragile.allocate(3 * kMiB, b); });
      attempt([&] { third = fragile.allocate(2 * kMiB, a); });
      attempt([&] { fragile.record_use(second, a); });
      attempt([&] { fragile.free(second, b); });
      attempt([&] { (void)fragile.grow(first, 2 * kMiB, stream(3)); });
      attempt([&] { second = fragile.allocate(5 * kMiB, b); });
      attempt([&] { fragile.free(third, a); });
      attempt([&] { fragile.release_stream(a); });
      if (GetParam()) {
        fake->synchronize_device();
        attempt([&] { fragile.evict(second); });
        attempt([&] { third = fragile.allocate(7 * kMiB, b); });
        attempt([&] { fragile.free(third, b); });
        attempt([&] { fragile.restore(second); });
      }
      attempt([&] { fragile.free(first, b); });
      attempt([&] { fragile.free_recorded(second); });
      attempt([&] { fragile.trim(); });
      fragile.trim();
      EXPECT_EQ(fake->mapped_bytes(), 0U) << "call " << asked;
      EXPECT_TRUE(fake->violations().empty()) << fake->violations().front();
      k = asked;
      if (!failed) break;  // the script has fewer calls than k
    }
  }
}

TEST_P(ArenaTest, GrowThatCannotWaitLeavesTheCounts) {
  void* block = arena.allocate(kMiB, a);
  arena.free(arena.allocate(kMiB, b), b);
  const ArenaStats before = arena.stats();
  upstream->fail_at(1, 1000);
  EXPECT_THROW(arena.grow(block, 2 * kMiB, stream(3)), DeviceError);
  upstream->fail_at(0);
  EXPECT_EQ(arena.stats().requested_bytes, before.requested_bytes);
  EXPECT_EQ(arena.stats().num_blocks, 1U);
  EXPECT_EQ(arena.block_bytes(block), kMiB);
  EXPECT_TRUE(arena.grow(block, 2 * kMiB, stream(3)));
}

TEST_P(ArenaTest, TrimThatCannotWaitLeavesEveryHandle) {
  arena.free(arena.allocate(9 * kMiB, a), a);
  const std::size_t reserved = arena.stats().reserved_bytes;
  upstream->fail_at(1, 1000);
  EXPECT_THROW(arena.trim(), DeviceError);
  upstream->fail_at(0);
  arena.check_integrity();
  EXPECT_EQ(arena.stats().reserved_bytes, reserved);
  EXPECT_EQ(arena.trim(), reserved);
}

TEST_P(ArenaTest, FreeRecordedWaitsForEveryRecordedStream) {
  void* block = arena.allocate(2 * kMiB, a);
  for (std::uintptr_t id = 1; id <= 3; ++id) {
    if (id > 1) upstream->order(stream(id - 1), stream(id));
    upstream->write(block, 2 * kMiB, std::uint8_t(id), stream(id));
    arena.record_use(block, stream(id));
  }
  arena.free_recorded(block);
  EXPECT_THROW(arena.free_recorded(block), InvalidArgument);
  EXPECT_EQ(arena.allocate(2 * kMiB, stream(4)), block);
  upstream->write(block, 2 * kMiB, 9, stream(4));
}

TEST(ArenaMappedTest, GrowthMovesNothingAndJoinsHandles) {
  auto upstream = make_fake(64 * kMiB);
  Arena arena(upstream, 32 * kMiB, {.handle_bytes = 2 * kMiB, .use_lanes = false});
  void* first = arena.allocate(3 * kMiB / 2, nullptr);
  void* second = arena.allocate(3 * kMiB, nullptr);
  EXPECT_EQ(static_cast<std::byte*>(second) - static_cast<std::byte*>(first), 3 * kMiB / 2);
  EXPECT_EQ(arena.stats().reserved_bytes, 5 * kMiB);  // the half-used handle is used up first
}

// The driver's cost is by the piece.
TEST(ArenaMappedTest, LargeGrowthTakesEightPieces) {
  Arena arena(make_fake(64 * kMiB), 64 * kMiB, {.handle_bytes = kMiB});
  arena.allocate(kMiB, nullptr);
  EXPECT_EQ(arena.stats().num_slabs, 1U);
  arena.allocate(8 * kMiB, nullptr);
  EXPECT_EQ(arena.stats().num_slabs, 9U);
  void* const large = arena.allocate(33 * kMiB, nullptr);  // an eighth is rounded up to 5
  EXPECT_EQ(arena.stats().num_slabs, 9U + 7U);
  EXPECT_EQ(arena.stats().reserved_bytes, 42 * kMiB);
  arena.free(large, nullptr);
  EXPECT_EQ(arena.trim(), 33 * kMiB);
}

TEST(ArenaMappedTest, SpreadFreeMemoryIsMappedTogetherBeforeOutOfMemory) {
  auto upstream = make_fake(64 * kMiB);
  Arena arena(upstream, 16 * kMiB, {.handle_bytes = 2 * kMiB, .use_lanes = false});
  void* blocks[8];
  for (void*& block : blocks) block = arena.allocate(2 * kMiB, nullptr);
  for (const int i : {0, 2, 4, 6}) arena.free(blocks[i], nullptr);
  EXPECT_NO_THROW(arena.allocate(8 * kMiB, nullptr));
  arena.check_integrity();
  EXPECT_EQ(arena.stats().reserved_bytes, 16 * kMiB);
  EXPECT_TRUE(upstream->violations().empty());
}

TEST(ArenaMappedTest, EvictedBlocksKeepTheirAddressAndGiveTheirMemory) {
  auto upstream = make_fake(64 * kMiB);
  Arena arena(upstream, 16 * kMiB, {.handle_bytes = 2 * kMiB, .use_lanes = false});
  void* entry = arena.allocate(9 * kMiB + 1000, nullptr);
  arena.allocate(1000, nullptr);
  arena.evict(entry);
  arena.check_integrity();
  EXPECT_LE(arena.stats().reserved_bytes, 4 * kMiB);
  EXPECT_THROW(arena.record_use(entry, nullptr), InvalidArgument);
  EXPECT_THROW(arena.evict(entry), InvalidArgument);
  void* other = arena.allocate(12 * kMiB, nullptr);
  EXPECT_THROW(arena.restore(entry), OutOfMemory);
  arena.check_integrity();
  arena.free(other, nullptr);
  arena.restore(entry);
  EXPECT_EQ(arena.block_bytes(entry), 9 * kMiB + 1024);
  arena.check_integrity();
  arena.evict(entry);
  arena.free(entry, nullptr);
  arena.check_integrity();
  EXPECT_THROW(arena.restore(entry), InvalidArgument);
  EXPECT_TRUE(upstream->violations().empty());
}

TEST(ArenaMappedTest, MemoryIsCommittedAheadByAnotherThread) {
  auto upstream = make_fake(64 * kMiB);
  Arena arena(upstream, 32 * kMiB, {.handle_bytes = 2 * kMiB, .ahead_bytes = 2 * kMiB});
  arena.allocate(kMiB / 2, nullptr);
  arena.allocate(kMiB, nullptr);
  const auto has_ahead = [&] { return arena.stats().ahead_bytes >= 2 * kMiB; };
  for (int i = 0; i < 5000 && !has_ahead(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(has_ahead());
  const auto calls = upstream->num_memory_calls();
  arena.allocate(kMiB, nullptr);
  arena.check_integrity();
  EXPECT_GE(upstream->num_memory_calls(), calls);
}

TEST(ArenaLanesTest, SmallBlocksComeBackExactlyAndAreFlushedUnderPressure) {
  auto upstream = make_fake(64 * kMiB);
  Arena arena(upstream, 2 * kMiB, {.handle_bytes = 2 * kMiB});
  void* block = arena.allocate(1000, stream(1));
  arena.free(block, stream(1));
  EXPECT_EQ(arena.stats().lane_bytes, 1024U);
  EXPECT_EQ(arena.stats().num_blocks, 0U);
  EXPECT_THROW(arena.free(block, stream(1)), InvalidArgument);
  EXPECT_EQ(arena.allocate(900, stream(1)), block);
  EXPECT_EQ(arena.stats().requested_bytes, 900U);
  arena.free(block, stream(1));
  arena.check_integrity();
  EXPECT_NO_THROW(arena.allocate(2 * kMiB, stream(2)));
  arena.check_integrity();
}

// A lane has more blocks than one stream's slot: when the driver keeps the arena from giving one of
// them back, none may be lost.
TEST(ArenaLanesTest, LaneThatCannotGiveKeepsItsBlocks) {
  auto upstream = make_fake(64 * kMiB);
  Arena arena(upstream, 16 * kMiB, {.handle_bytes = 2 * kMiB});
  std::vector<void*> blocks;
  for (int i = 0; i < 20; ++i) blocks.push_back(arena.allocate(1000, stream(100)));
  for (std::uintptr_t id = 1; id <= 32; ++id) {  // no slot is left for stream 100
    arena.free(arena.allocate(kMiB / 8, stream(id)), stream(id));
  }
  int num_freed = 0;
  for (void* block : blocks) {
    upstream->fail_at(1, 1000, true);
    try {
      arena.free(block, stream(100));
      ++num_freed;
    } catch (const DeviceError&) {
    }
    upstream->fail_at(0);
    arena.check_integrity();
    EXPECT_EQ(arena.stats().num_blocks, 20U - unsigned(num_freed));
  }
  EXPECT_EQ(num_freed, 8);  // what the lane holds
  for (std::size_t i = 8; i < blocks.size(); ++i) arena.free(blocks[i], stream(100));
  EXPECT_EQ(arena.stats().num_blocks, 0U);
  EXPECT_TRUE(upstream->violations().empty()) << upstream->violations().front();
}

TEST(ArenaLanesTest, FourThreadsKeepEveryByteCounted) {
  auto upstream = make_fake(256 * kMiB);
  Arena arena(upstream, 128 * kMiB, {.handle_bytes = 2 * kMiB, .ahead_bytes = 2 * kMiB});
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (std::uintptr_t id = 1; id <= 4; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937 rng{unsigned(id)};
      std::vector<void*> live;
      for (int step = 0; step < 4000; ++step) {
        if (!live.empty() && (rng() % 2 == 0 || live.size() > 50)) {
          std::swap(live[rng() % live.size()], live.back());
          arena.free(live.back(), stream(id % 3));
          live.pop_back();
        } else {
          live.push_back(arena.allocate(1 + rng() % (rng() % 8 == 0 ? 500000 : 9000), stream(id)));
        }
      }
      for (void* block : live) arena.free(block, stream(id));
    });
  }
  std::thread reader([&] {
    while (!stop) {
      const ArenaStats s = arena.stats();
      ASSERT_EQ(s.reserved_bytes, s.requested_bytes + s.rounding_bytes + s.pending_bytes +
                                      s.returnable_bytes + s.scattered_bytes + s.lane_bytes);
      std::this_thread::yield();
    }
  });
  for (std::thread& thread : threads) thread.join();
  stop = true;
  reader.join();
  arena.check_integrity();
  EXPECT_EQ(arena.stats().num_blocks, 0U);
  EXPECT_EQ(arena.stats().requested_bytes, 0U);
  upstream->run_all();
  EXPECT_TRUE(upstream->violations().empty()) << upstream->violations().front();
}

}  // namespace
}  // namespace fastgpt
