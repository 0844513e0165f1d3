#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "fastgpt/check.h"
#include "fastgpt/fake_upstream.h"
#include "fastgpt/layer_cache.h"

namespace fastgpt {
namespace {

constexpr std::size_t kUnit = 64 << 10;

void* stream(std::uintptr_t id) { return reinterpret_cast<void*>(id); }

/// Four stamped entries in a device of 16 units, with a host tier, on one fake driver.
struct Four {
  explicit Four(std::size_t host_bytes = 64 * kUnit)
      : upstream(std::make_shared<FakeUpstream>(
            FakeUpstream::Options{256 * kUnit, true, kUnit, /*seed=*/3})),
        host(std::make_shared<Arena>(upstream, host_bytes, ArenaOptions{.handle_bytes = kUnit})),
        cache(std::make_shared<LayerCache>(
            std::make_unique<Arena>(upstream, 16 * kUnit, ArenaOptions{.handle_bytes = kUnit}),
            SwapOptions{host, true, /*chunk_bytes=*/56 << 10})) {
    for (std::size_t i = 0; i < names.size(); ++i) {
      const auto lease = allocate(i, stream(1 + i % 2));
      upstream->write(lease->data(), bytes(i), std::uint8_t(i + 1), stream(1 + i % 2));
    }
  }
  ~Four() {
    upstream->run_all();
    EXPECT_TRUE(upstream->violations().empty()) << upstream->violations().front();
    cache->arena().check_integrity();
    host->check_integrity();
  }

  static std::size_t bytes(std::size_t i) { return 2 * kUnit + 777 * i; }
  std::unique_ptr<Lease> allocate(std::size_t i, void* on) {
    return cache->allocate(bytes(i), names[i], "u8", Contents::kUndefined, on);
  }
  void expect_bytes(void* on) {
    for (std::size_t i = 0; i < names.size(); ++i) {
      const auto lease = allocate(i, on);
      upstream->expect(lease->data(), bytes(i), std::uint8_t(i + 1), on);
    }
  }
  std::size_t num_evicted() const {
    std::size_t count = 0;
    for (const EntryInfo& entry : cache->entries()) count += entry.is_evicted ? 1 : 0;
    return count;
  }

  const std::vector<std::string> names{"a", "b", "c", "d"};
  std::shared_ptr<FakeUpstream> upstream;
  std::shared_ptr<Arena> host;
  std::shared_ptr<LayerCache> cache;
};

TEST(LayerCacheManyTest, AllLeaveAndReturnWithTheirBytes) {
  Four four;
  for (int round = 0; round < 3; ++round) {
    four.cache->evict_all(four.names);
    EXPECT_EQ(four.num_evicted(), 4u);
    EXPECT_LT(four.cache->arena().stats().reserved_bytes, 2 * kUnit);
    four.upstream->run(5);
    four.cache->restore_all(four.names, stream(3));
    EXPECT_EQ(four.num_evicted(), 0u);
    four.expect_bytes(stream(3));
  }
}

TEST(LayerCacheManyTest, AFailureAtAnyCallLosesNothing) {
  for (std::uint64_t call = 1; call < 200; ++call) {
    Four four;
    four.upstream->fail_at(call);
    bool failed = false;
    try {
      four.cache->evict_all(four.names);
      four.cache->restore_all(four.names, stream(3));
    } catch (const Error&) {
      failed = true;
    }
    four.upstream->fail_at(0);
    four.cache->arena().check_integrity();
    four.upstream->synchronize_device();  // what did not move is not ordered for stream 3
    four.expect_bytes(stream(3));
    four.cache->evict_all(four.names);
    four.cache->restore_all(four.names, stream(2));
    four.expect_bytes(stream(2));
    if (!failed && call > 150) return;
  }
}

TEST(LayerCacheManyTest, WithoutHostMemoryTheOthersStay) {
  Four four(4 * kUnit);  // for one entry only
  EXPECT_THROW(four.cache->evict_all(four.names), OutOfMemory);
  EXPECT_EQ(four.num_evicted(), 0u);
  four.upstream->synchronize_device();
  four.expect_bytes(stream(1));
}

TEST(LayerCacheManyTest, HeldOnTheHostAnEntryStaysThere) {
  Four four;
  EXPECT_THROW(four.cache->hold_host("a"), InvalidArgument) << "it is on the device";
  four.cache->evict("a");
  EXPECT_THROW(four.cache->hold_host("a"), InvalidArgument) << "it is not frozen";
  four.cache->freeze("a");
  EXPECT_NE(four.cache->hold_host("a"), nullptr);
  EXPECT_THROW(four.cache->restore("a", stream(1)), InvalidArgument);
  EXPECT_THROW(four.cache->restore_all({"a"}, stream(1)), InvalidArgument);
  EXPECT_THROW(four.cache->free("a", stream(1)), InvalidArgument);
  EXPECT_THROW(four.cache->thaw("a"), InvalidArgument);
  four.cache->release_host("a");
  four.upstream->synchronize_device();
  four.expect_bytes(stream(1));
}

}  // namespace
}  // namespace fastgpt
