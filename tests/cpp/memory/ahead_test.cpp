#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "fastgpt/arena.h"
#include "fastgpt/fake_upstream.h"

namespace fastgpt {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

// What is committed ahead may fit more tightly than a hole. An arena that took it first had more
// committed for it at once: a window of layers passing through it grew to its whole budget.
TEST(ArenaAheadTest, HolesAreFilledBeforeWhatWasCommittedAhead) {
  Arena arena(std::make_shared<FakeUpstream>(FakeUpstream::Options{.granularity = kMiB}), 32 * kMiB,
              {.handle_bytes = 2 * kMiB, .ahead_bytes = 2 * kMiB});
  void* const first = arena.allocate(6 * kMiB, nullptr);
  void* const second = arena.allocate(kMiB, nullptr);
  const auto has_ahead = [&] { return arena.stats().ahead_bytes >= 2 * kMiB; };
  for (int i = 0; i < 5000 && !has_ahead(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  ASSERT_TRUE(has_ahead());
  arena.free(first, nullptr);
  EXPECT_EQ(arena.allocate(2 * kMiB, nullptr), first) << "a hole of 6 MiB was there";
  EXPECT_EQ(arena.allocate(4 * kMiB, nullptr), static_cast<std::byte*>(first) + 2 * kMiB);
  EXPECT_GT(arena.allocate(2 * kMiB, nullptr), second)
      << "and what is ahead serves when no hole does";
  arena.check_integrity();
}

}  // namespace
}  // namespace fastgpt
