// What does an allocate + free pair of the arena cost: hot, among holes, at random, and when
// threads meet? One file, no library:
//
//   g++ -std=c++20 -O3 -Icsrc -Icsrc/include benchmarks/micro/arena_benchmark.cpp
//       csrc/memory/*.cpp csrc/runtime/upstream_cpu.cpp -lpthread -o arena_benchmark
//   ./arena_benchmark [most threads]                (cmake builds it, too)
//
// Host memory stands for the device's: no driver call is in a pair, so the device does not matter.
// Times are medians over batches, in ns; the last line is JSON.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fastgpt/arena.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t kKiB = std::size_t{1} << 10;
constexpr std::size_t kGiB = std::size_t{1} << 30;

std::string json = "{";

void report(const std::string& name, double value, const char* unit) {
  std::printf("%-46s%10.2f %s\n", name.c_str(), value, unit);
  std::fflush(stdout);
  json += (json.size() > 1 ? ", \"" : "\"") + name + "\": " + std::to_string(value);
}

double ns_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
}

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[std::size_t(q * double(values.size() - 1))];
}

// An arena with `num_holes` free blocks between live ones.
std::unique_ptr<fastgpt::Arena> make_arena(std::size_t num_holes, bool use_lanes) {
  auto arena = std::make_unique<fastgpt::Arena>(fastgpt::make_host_upstream(), 64 * kGiB,
                                                fastgpt::ArenaOptions{.use_lanes = use_lanes});
  std::mt19937_64 random(1);
  std::vector<void*> blocks;
  for (std::size_t i = 0; i < 2 * num_holes; ++i) {
    blocks.push_back(arena->allocate(256 + random() % (64 * kKiB), nullptr));
  }
  for (std::size_t i = 0; i < blocks.size(); i += 2) arena->free(blocks[i], nullptr);
  return arena;
}

// The same size again and again. Without lanes, and above 32 KiB, every pair goes to the heap.
double hot_pair(std::size_t num_holes, std::size_t bytes, bool use_lanes) {
  const auto arena = make_arena(num_holes, use_lanes);
  constexpr int kBatch = 1000;
  std::vector<double> ns;
  for (int batch = 0; batch < 500; ++batch) {
    const auto begin = Clock::now();
    for (int i = 0; i < kBatch; ++i) arena->free(arena->allocate(bytes, nullptr), nullptr);
    ns.push_back(ns_since(begin) / kBatch);
  }
  return quantile(ns, 0.5);
}

// One random free and one random allocate, sizes 256 B to 64 KiB.
std::vector<double> random_pairs(std::size_t num_holes) {
  const auto arena = make_arena(num_holes, true);
  std::mt19937_64 random(2);
  std::vector<void*> live;
  const auto size = [&] { return 256 + random() % (64 * kKiB); };
  for (int i = 0; i < 65536; ++i) live.push_back(arena->allocate(size(), nullptr));
  constexpr int kBatch = 16;
  std::vector<double> ns;
  for (int batch = 0; batch < 20000; ++batch) {
    std::size_t at[kBatch];
    std::size_t bytes[kBatch];
    void* blocks[kBatch];  // the caller's own pointers are warm
    for (int i = 0; i < kBatch; ++i) {
      at[i] = random() % live.size();
      bytes[i] = size();
      blocks[i] = std::exchange(live[at[i]], nullptr);
    }
    const auto begin = Clock::now();
    for (int i = 0; i < kBatch; ++i) {
      if (blocks[i] != nullptr) arena->free(blocks[i], nullptr);
      blocks[i] = arena->allocate(bytes[i], nullptr);
    }
    const double spent = ns_since(begin);
    for (int i = 0; i < kBatch; ++i) {
      if (live[at[i]] != nullptr) arena->free(live[at[i]], nullptr);  // drawn twice
      live[at[i]] = blocks[i];
    }
    ns.push_back(spent / kBatch);
  }
  return ns;
}

// Millions of pairs a second of all threads together, blocks of 1 KiB; the best of five rounds.
double threads_rate(int num_threads) {
  constexpr int kPairs = 400000;
  double best = 0.0;
  for (int round = 0; round < 5; ++round) {
    fastgpt::Arena arena(fastgpt::make_host_upstream(), kGiB);
    std::atomic<int> num_ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < num_threads; ++t) {
      threads.emplace_back([&] {
        arena.free(arena.allocate(kKiB, nullptr), nullptr);
        ++num_ready;
        while (!go) std::this_thread::yield();
        for (int i = 0; i < kPairs; ++i) arena.free(arena.allocate(kKiB, nullptr), nullptr);
      });
    }
    while (num_ready < num_threads) std::this_thread::yield();
    const auto begin = Clock::now();
    go = true;
    for (std::thread& thread : threads) thread.join();
    best = std::max(best, 1e3 * num_threads * kPairs / ns_since(begin));
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int most_threads = argc > 1 ? std::atoi(argv[1]) : int(std::thread::hardware_concurrency());
  // The C library skips the locks of a process with one thread; a service has many.
  std::atomic<bool> stop{false};
  std::thread other([&] { stop.wait(false); });
  for (const std::size_t holes : {64, 4096, 65536}) {
    const std::string among = " among " + std::to_string(holes) + " holes";
    report("hot pair, 1 KiB, lane," + among, hot_pair(holes, kKiB, true), "ns");
    report("hot pair, 1 KiB, heap," + among, hot_pair(holes, kKiB, false), "ns");
    report("hot pair, 1 MiB, heap," + among, hot_pair(holes, kKiB * kKiB, false), "ns");
  }
  for (const std::size_t holes : {64, 65536}) {
    const std::string among = " among " + std::to_string(holes) + " holes";
    const std::vector<double> ns = random_pairs(holes);
    report("random pair, p50," + among, quantile(ns, 0.5), "ns");
    report("random pair, p99," + among, quantile(ns, 0.99), "ns");
  }
  double one = 0.0;
  for (int threads = 1; threads <= most_threads; threads *= 2) {
    const double rate = threads_rate(threads);
    if (threads == 1) one = rate;
    report(std::to_string(threads) + " threads", rate, "million pairs/s");
    if (threads > 1) report(std::to_string(threads) + " threads over one", rate / one, "x");
  }
  stop = true;
  stop.notify_one();
  other.join();
  std::printf("%s}\n", json.c_str());
}
