#include "fastgpt/layer_cache.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>
#include <tuple>

#include "fastgpt/fake_upstream.h"

namespace fastgpt {
namespace {

constexpr std::size_t kUnit = 16 << 10;  // small, so that every failing call can be tried

void* stream(std::uintptr_t id) { return reinterpret_cast<void*>(id); }

/// A device with a budget of 16 units and a host tier, on one fake driver.
struct Swapping {
  explicit Swapping(bool evict_when_full, std::size_t host_bytes = 64 * kUnit)
      : upstream(std::make_shared<FakeUpstream>(
            FakeUpstream::Options{256 * kUnit, true, kUnit, /*seed=*/5})),
        host(std::make_shared<Arena>(upstream, host_bytes, ArenaOptions{.handle_bytes = kUnit})),
        cache(std::make_shared<LayerCache>(
            std::make_unique<Arena>(upstream, 16 * kUnit, ArenaOptions{.handle_bytes = kUnit}),
            SwapOptions{host, evict_when_full, /*chunk_bytes=*/kUnit * 7 / 8})) {}
  ~Swapping() {
    upstream->run_all();
    EXPECT_TRUE(upstream->violations().empty()) << upstream->violations().front();
    cache->arena().check_integrity();
    host->check_integrity();
  }

  std::unique_ptr<Lease> make(const std::string& name, std::size_t bytes, std::uint8_t stamp,
                              void* on) {
    auto lease = cache->allocate(bytes, name, "u8", Contents::kUndefined, on);
    upstream->write(lease->data(), bytes, stamp, on);
    return lease;
  }

  std::shared_ptr<FakeUpstream> upstream;
  std::shared_ptr<Arena> host;
  std::shared_ptr<LayerCache> cache;
};

TEST(LayerCacheSwapTest, EvictAndRestoreGiveTheSameBytesAtTheSameAddress) {
  Swapping pool(false);
  void* const data = pool.make("layer", 5 * kUnit + 123, 7, stream(1))->data();
  pool.cache->evict("layer");
  EXPECT_TRUE(pool.cache->entries()[0].is_evicted);
  EXPECT_LT(pool.cache->arena().stats().reserved_bytes, 2 * kUnit);
  pool.cache->restore("layer", stream(2));
  const auto lease =
      pool.cache->allocate(5 * kUnit + 123, "layer", "u8", Contents::kUndefined, stream(2));
  EXPECT_EQ(lease->data(), data);
  pool.upstream->expect(data, 5 * kUnit + 123, 7, stream(2));
}

TEST(LayerCacheSwapTest, EveryStreamWaitsForTheReturn) {
  Swapping pool(false);
  void* const data = pool.make("layer", 4 * kUnit, 7, stream(1))->data();
  pool.cache->evict("layer");
  pool.cache->restore("layer", stream(2));
  pool.cache->acquire("layer", stream(3));
  pool.upstream->expect(data, 4 * kUnit, 7, stream(3));
  pool.cache->release("layer", stream(3));
  pool.cache->restore("layer", stream(4));  // is back already, but not yet for this stream
  pool.upstream->expect(data, 4 * kUnit, 7, stream(4));
  pool.cache->evict("layer");  // waits for streams 3 and 4
  pool.cache->restore("layer", stream(1));
  pool.upstream->expect(data, 4 * kUnit, 7, stream(1));
}

TEST(LayerCacheSwapTest, WrittenEntriesAreCopiedAgainFrozenOnesAreNot) {
  Swapping pool(false);
  pool.cache->set_schedule({});
  void* const data = pool.make("layer", 2 * kUnit, 1, stream(1))->data();
  pool.cache->evict("layer");
  pool.cache->restore("layer", stream(1));
  pool.upstream->write(data, 2 * kUnit, 2, stream(1));
  pool.cache->evict("layer");
  EXPECT_EQ(pool.cache->swap_stats().num_clean_evictions, 0U);
  pool.cache->freeze("layer");
  pool.cache->restore("layer", stream(1));
  pool.upstream->expect(data, 2 * kUnit, 2, stream(1));
  pool.cache->evict("layer");
  EXPECT_EQ(pool.cache->swap_stats().num_clean_evictions, 1U);
  pool.cache->restore("layer", stream(1));
  pool.upstream->expect(data, 2 * kUnit, 2, stream(1));
  pool.cache->thaw("layer");
  EXPECT_EQ(pool.cache->swap_stats().host_bytes, 0U);
  pool.upstream->write(data, 2 * kUnit, 3, stream(1));
  pool.cache->evict("layer");
  pool.cache->restore("layer", stream(1));
  pool.upstream->expect(data, 2 * kUnit, 3, stream(1));
  EXPECT_EQ(pool.cache->swap_stats().num_clean_evictions, 1U);
}

TEST(LayerCacheSwapTest, ZeroedFrozenEntryIsNoLongerClean) {
  Swapping pool(false);
  void* const data = pool.make("layer", 2 * kUnit, 1, stream(1))->data();
  pool.cache->freeze("layer");
  pool.cache->evict("layer");
  pool.cache->allocate(2 * kUnit, "layer", "u8", Contents::kZero, stream(1));
  pool.cache->evict("layer");
  pool.cache->restore("layer", stream(1));
  pool.upstream->expect(data, 2 * kUnit, 0, stream(1));
}

TEST(LayerCacheSwapTest, PinnedLeasedAndHeldEntriesStay) {
  Swapping pool(true);
  auto held = pool.make("layer", 2 * kUnit, 1, stream(1));
  EXPECT_THROW(pool.cache->evict("layer"), InvalidArgument);  // a tensor may touch it any time
  EXPECT_THROW(pool.cache->allocate(15 * kUnit, "", "u8", Contents::kUndefined, stream(1)),
               OutOfMemory);
  pool.cache->set_schedule({"layer"});
  pool.cache->pin("layer");
  EXPECT_THROW(pool.cache->evict("layer"), InvalidArgument);
  EXPECT_THROW(pool.cache->allocate(15 * kUnit, "", "u8", Contents::kUndefined, stream(1)),
               OutOfMemory);
  EXPECT_THROW(pool.cache->free("layer", stream(1)), InvalidArgument);
  pool.cache->unpin("layer");
  pool.cache->acquire("layer", stream(1));
  EXPECT_THROW(pool.cache->evict("layer"), InvalidArgument);
  EXPECT_THROW(pool.cache->allocate(15 * kUnit, "", "u8", Contents::kUndefined, stream(1)),
               OutOfMemory);
  pool.cache->release("layer", stream(1));
  EXPECT_NO_THROW(pool.cache->allocate(15 * kUnit, "", "u8", Contents::kUndefined, stream(1)));
  EXPECT_EQ(pool.cache->swap_stats().num_evictions, 1U);
  EXPECT_THROW(pool.cache->release("layer", stream(1)), InvalidArgument);
  EXPECT_THROW(pool.cache->unpin("layer"), InvalidArgument);
  pool.cache->free("layer", stream(1));  // comes back for the one who holds it
  pool.upstream->expect(held->data(), 2 * kUnit, 1, stream(1));
}

TEST(LayerCacheSwapTest, TheFarthestInTheScheduleLeavesFirst) {
  Swapping pool(true);
  std::vector<std::string> names;
  for (int i = 0; i < 6; ++i) {
    names.push_back("layer" + std::to_string(i));
    pool.make(names.back(), 3 * kUnit, std::uint8_t(i), stream(1));
    if (i < 5) pool.cache->set_schedule(names);
  }
  // The sixth did not fit beside five: layer 4, the farthest from the start, left.
  const auto evicted = [&] {
    std::vector<std::string> gone;
    for (const EntryInfo& entry : pool.cache->entries()) {
      if (entry.is_evicted) gone.push_back(entry.name);
    }
    return gone;
  };
  EXPECT_EQ(evicted(), std::vector<std::string>{"layer4"});
  pool.cache->set_schedule(names);
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 6; ++i) {
      pool.cache->acquire(names[i], stream(1));
      const auto lease =
          pool.cache->allocate(3 * kUnit, names[i], "u8", Contents::kUndefined, stream(1));
      pool.upstream->expect(lease->data(), 3 * kUnit, std::uint8_t(i), stream(1));
      pool.cache->release(names[i], stream(1));
    }
  }
  // Five of six fit. Least recently used would restore all six a round: 18 in three rounds.
  EXPECT_LE(pool.cache->swap_stats().num_restores, 6U);
  EXPECT_THROW(pool.cache->set_schedule({"layer0", "layer0"}), InvalidArgument);
}

TEST(LayerCacheSwapTest, HostWithoutRoomIsOutOfMemoryAndNothingMoves) {
  Swapping pool(true, kUnit);
  pool.make("layer", 8 * kUnit, 1, stream(1));
  EXPECT_THROW(pool.cache->evict("layer"), OutOfMemory);
  EXPECT_THROW(pool.make("other", 12 * kUnit, 1, stream(1)), OutOfMemory);
  EXPECT_FALSE(pool.cache->entries()[0].is_evicted);
  EXPECT_FALSE(pool.cache->contains("other"));
}

// Each driver call of a script fails, alone or with all that follow, by throwing or by refusing.
// After it every entry is as before, and what failed can be done again.
TEST(LayerCacheSwapTest, EveryDriverCallMayFail) {
  const auto names = [](const LayerCache& cache) {
    std::vector<std::tuple<std::string, std::size_t, int>> list;
    for (const EntryInfo& e : cache.entries()) list.emplace_back(e.name, e.bytes, e.num_leases);
    return list;
  };
  for (const bool throws : {false, true}) {
    for (const std::uint64_t num : {1, 1000}) {
      for (std::uint64_t asked = 1;; ++asked) {
        ASSERT_LT(asked, 1000U);
        Swapping pool(true);
        LayerCache& cache = *pool.cache;
        const std::size_t bytes = 6 * kUnit;
        pool.make("a", bytes, 1, stream(1));
        pool.make("b", bytes, 2, stream(2));
        std::uint64_t k = asked;
        bool failed = false;
        const auto attempt = [&](auto act) {
          const auto was = names(cache);
          const std::uint64_t before = pool.upstream->num_calls();
          pool.upstream->fail_at(failed ? 0 : k, num, throws);
          bool done = true;
          try {
            act();
          } catch (const Error&) {
            done = false;
          }
          pool.upstream->fail_at(0);
          const std::uint64_t calls = pool.upstream->num_calls() - before;
          const bool reached = !failed && calls >= k;
          if (!failed && !reached) k -= calls;
          failed |= reached;
          cache.trim();  // frees what the failure kept
          cache.arena().check_integrity();
          if (done) return;
          EXPECT_EQ(names(cache), was) << "call " << asked;
          act();
        };
        attempt([&] { cache.evict("a"); });
        attempt([&] { cache.restore("a", stream(3)); });
        attempt([&] { cache.allocate(bytes, "a", "u8", Contents::kKeep, stream(3)); });
        attempt([&] { cache.allocate(8 * kUnit, "c", "u8", Contents::kZero, stream(1)); });
        attempt([&] {
          cache.acquire("b", stream(1));
          cache.release("b", stream(2));
        });
        attempt([&] { cache.allocate(7 * kUnit, "a", "u8", Contents::kKeep, stream(1)); });
        auto lease = cache.allocate(8 * kUnit, "c", "u8", Contents::kKeep, stream(1));
        attempt([&] { cache.record_use_of(lease->data(), stream(4)); });
        attempt([&] { cache.allocate(kUnit, "c", "other", Contents::kKeep, stream(1)); });
        pool.upstream->expect(lease->data(), 8 * kUnit, 0, stream(1));
        attempt([&] { lease.reset(); });
        attempt([&] { cache.free("c", stream(1)); });
        attempt([&] { cache.release_stream(stream(2)); });
        cache.acquire("b", stream(1));
        auto b = cache.allocate(bytes, "b", "u8", Contents::kKeep, stream(1));
        pool.upstream->expect(b->data(), bytes, 2, stream(1));
        cache.release("b", stream(1));
        auto a = cache.allocate(7 * kUnit, "a", "u8", Contents::kKeep, stream(1));
        auto* const rest = static_cast<std::byte*>(a->data()) + bytes;
        pool.upstream->expect(a->data(), bytes, 1, stream(1));
        pool.upstream->expect(rest, kUnit, 0, stream(1));
        EXPECT_EQ(cache.arena().stats().requested_bytes, 13 * kUnit);
        if (!failed) break;  // the script has fewer calls
      }
    }
  }
}

TEST(LayerCacheSwapTest, EntryThatGrowsInPlaceKeepsItsSizeWhenItsFillFails) {
  for (const Contents contents : {Contents::kZero, Contents::kKeep}) {
    Swapping pool(false);
    void* const data = pool.make("layer", kUnit, 1, stream(1))->data();
    pool.make("", 3 * kUnit, 2, stream(1));  // leaves free memory behind the entry
    bool failed = false;
    for (std::uint64_t k = 1;; ++k) {
      ASSERT_LT(k, 100U);
      pool.upstream->fail_at(k, 1, true);
      std::unique_ptr<Lease> lease;
      try {
        lease = pool.cache->allocate(2 * kUnit, "layer", "u8", contents, stream(1));
      } catch (const DeviceError&) {
        failed = true;
      }
      pool.upstream->fail_at(0);
      if (lease != nullptr) {
        EXPECT_EQ(lease->data(), data);
        break;
      }
      EXPECT_EQ(pool.cache->arena().stats().requested_bytes, kUnit);
      EXPECT_EQ(pool.cache->entries()[0].bytes, kUnit);
      pool.upstream->expect(data, kUnit, 1, stream(1));
    }
    EXPECT_TRUE(failed);
  }
}

// A tensor dies while the driver fails: its memory is freed by the next call.
TEST(LayerCacheSwapTest, LeaseEndsWhileTheDriverFails) {
  Swapping pool(false);
  auto lease = pool.cache->allocate(1000, "", "u8", Contents::kUndefined, stream(100));
  for (std::uintptr_t id = 1; id <= 40; ++id) {  // no slot is left for stream 100
    auto other = pool.cache->allocate(40000, "", "u8", Contents::kUndefined, stream(id));
    pool.cache->record_use_of(lease->data(), stream(id + 50));
  }
  pool.upstream->fail_at(1, 100000, true);
  lease.reset();
  EXPECT_EQ(pool.cache->arena().stats().num_blocks, 1U);
  pool.upstream->fail_at(0);
  pool.cache->trim();
  EXPECT_EQ(pool.cache->arena().stats().num_blocks, 0U);
}

TEST(LayerCacheSwapTest, ConstructorThatFailsLeavesNoStream) {
  for (std::uint64_t k = 1; k <= 2; ++k) {
    auto upstream =
        std::make_shared<FakeUpstream>(FakeUpstream::Options{256 * kUnit, true, kUnit, 0});
    auto host = std::make_shared<Arena>(upstream, 16 * kUnit);
    auto arena = std::make_unique<Arena>(upstream, 16 * kUnit);
    upstream->fail_at(k);
    EXPECT_THROW(std::make_shared<LayerCache>(std::move(arena), SwapOptions{host, true, 9000}),
                 DeviceError);
    EXPECT_EQ(upstream->num_streams(), 0);
  }
}

// The stream that used an entry is gone, and its handle may be another stream's by now.
TEST(LayerCacheSwapTest, DestroyedStreamIsWaitedForAndNotTouched) {
  Swapping pool(false);
  void* const user = pool.upstream->create_stream();
  void* const data = pool.make("layer", 2 * kUnit, 1, user)->data();
  auto unnamed = pool.cache->allocate(3 * kUnit, "", "u8", Contents::kUndefined, user);
  pool.upstream->write(unnamed->data(), 3 * kUnit, 2, user);
  pool.cache->release_stream(user);
  pool.upstream->destroy_stream(user);
  unnamed.reset();
  auto next = pool.cache->allocate(3 * kUnit, "", "u8", Contents::kUndefined, stream(1));
  pool.upstream->write(next->data(), 3 * kUnit, 3, stream(1));
  pool.cache->evict("layer");
  pool.cache->restore("layer", stream(1));
  pool.upstream->expect(data, 2 * kUnit, 1, stream(1));
}

TEST(LayerCacheSwapTest, CapturedStreamsNeitherEvictNorRestore) {
  Swapping pool(true);
  pool.make("out", 6 * kUnit, 1, stream(1));
  pool.cache->evict("out");
  pool.make("layer", 6 * kUnit, 2, stream(2));
  pool.upstream->begin_capture(stream(2));
  EXPECT_THROW(pool.cache->evict("layer"), DeviceError);
  EXPECT_THROW(pool.cache->restore("out", stream(2)), DeviceError);
  EXPECT_THROW(pool.make("large", 12 * kUnit, 3, stream(1)), OutOfMemory);  // "layer" has to stay
  EXPECT_THROW(pool.cache->release_stream(stream(2)), InvalidArgument);
  pool.upstream->end_capture(stream(2));
  EXPECT_NO_THROW(pool.make("large", 12 * kUnit, 3, stream(1)));
}

TEST(LayerCacheSwapTest, HostStreamsSwapUnderThreads) {
  const auto upstream = make_host_upstream();
  const auto host = std::make_shared<Arena>(make_host_upstream(), 64 * kUnit);
  const auto cache = std::make_shared<LayerCache>(
      std::make_unique<Arena>(upstream, 8 * kUnit, ArenaOptions{.handle_bytes = kUnit}),
      SwapOptions{host, true, 9000});
  std::vector<std::string> names;
  for (int i = 0; i < 8; ++i) {
    names.push_back(std::to_string(i));
    const auto lease =
        cache->allocate(2 * kUnit, names.back(), "u8", Contents::kUndefined, nullptr);
    std::memset(lease->data(), i, lease->bytes());
  }
  cache->set_schedule(names);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 2; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random{seed};
      for (int step = 0; step < 100; ++step) {
        const int i = int(random() % 8);
        cache->acquire(names[i], nullptr);
        const auto lease = cache->allocate(2 * kUnit, names[i], "u8", Contents::kKeep, nullptr);
        const auto* bytes = static_cast<const std::uint8_t*>(lease->data());
        if (bytes[0] != i || bytes[2 * kUnit - 1] != i) ++wrong;
        cache->release(names[i], nullptr);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  cache->arena().check_integrity();
  EXPECT_GT(cache->swap_stats().num_evictions, 8U);
}

}  // namespace
}  // namespace fastgpt
