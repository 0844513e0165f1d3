#include "fastgpt/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

#include "fastgpt/check.h"

namespace fastgpt {
namespace {

// Three threads, also where the process may use fewer cores.
class ThreadPoolTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { set_num_threads(3); }
};

void add_one(std::vector<int>& counts, std::int64_t first, std::int64_t last) {
  for (std::int64_t i = first; i < last; ++i) ++counts[i];
}

TEST_F(ThreadPoolTest, PiecesCoverTheRangeOnce) {
  for (const std::int64_t size : {0, 1, 2, 3, 7, 1000}) {
    for (const std::int64_t grain : {1, 2, 400, 5000}) {
      std::vector<int> counts(size);
      parallel_for(0, size, grain, [&](auto first, auto last) { add_one(counts, first, last); });
      EXPECT_EQ(counts, std::vector<int>(size, 1)) << size << " by " << grain;
    }
  }
}

TEST_F(ThreadPoolTest, WritesOfOneLoopAreSeenByTheNext) {
  std::vector<int> counts(301);
  for (int round = 0; round < 2000; ++round) {
    parallel_for(0, 301, 1, [&](auto first, auto last) { add_one(counts, first, last); });
  }
  EXPECT_EQ(counts, std::vector<int>(301, 2000));
}

TEST_F(ThreadPoolTest, SleepingWorkersWake) {
  std::vector<int> counts(300);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // longer than they spin
    parallel_for(0, 300, 1, [&](auto first, auto last) { add_one(counts, first, last); });
  }
  EXPECT_EQ(counts, std::vector<int>(300, 20));
}

TEST_F(ThreadPoolTest, ExceptionOfAnyPieceReachesTheCaller) {
  for (const std::int64_t bad : {0, 150, 299}) {
    EXPECT_THROW(parallel_for(0, 300, 1,
                              [&](auto first, auto last) {
                                if (first <= bad && bad < last) throw std::runtime_error("bad");
                              }),
                 std::runtime_error);
  }
  std::atomic<int> sum = 0;
  parallel_for(0, 300, 1, [&](auto first, auto last) { sum += int(last - first); });
  EXPECT_EQ(sum, 300);
}

TEST_F(ThreadPoolTest, NestedLoopRunsOnItsThread) {
  std::vector<int> counts(30 * 30);
  parallel_for(0, 30, 1, [&](auto first, auto last) {
    for (auto row = first; row < last; ++row) {
      parallel_for(row * 30, (row + 1) * 30, 1, [&](auto a, auto b) { add_one(counts, a, b); });
    }
  });
  EXPECT_EQ(counts, std::vector<int>(30 * 30, 1));
}

TEST_F(ThreadPoolTest, CallersOfSeveralThreadsDoNotMix) {
  std::vector<std::vector<int>> counts(4, std::vector<int>(300));
  std::vector<std::thread> callers;
  for (auto& mine : counts) {
    callers.emplace_back([&mine] {
      for (int round = 0; round < 300; ++round) {
        parallel_for(0, 300, 1, [&](auto first, auto last) { add_one(mine, first, last); });
      }
    });
  }
  for (auto& caller : callers) caller.join();
  for (const auto& mine : counts) EXPECT_EQ(mine, std::vector<int>(300, 300));
}

TEST_F(ThreadPoolTest, NumberOfThreadsIsFixedByTheFirstLoop) {
  parallel_for(0, 2, 1, [](auto, auto) {});
  EXPECT_EQ(num_threads(), 3);
  set_num_threads(3);
  EXPECT_THROW(set_num_threads(2), InvalidArgument);
  EXPECT_THROW(set_num_threads(-1), InvalidArgument);
}

}  // namespace
}  // namespace fastgpt
