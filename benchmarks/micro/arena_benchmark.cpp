// What does an allocate + free pair of the arena cost: hot, among holes, at random, and when
// threads meet?
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <random>
#include <vector>

#include "fastgpt/arena.h"

namespace {

constexpr std::size_t kGiB = std::size_t{1} << 30;

// An arena with `num_holes` free blocks between live ones.
std::unique_ptr<fastgpt::Arena> make_arena(std::int64_t num_holes, bool use_lanes) {
  auto arena = std::make_unique<fastgpt::Arena>(fastgpt::make_host_upstream(), 64 * kGiB,
                                                fastgpt::ArenaOptions{.use_lanes = use_lanes});
  std::mt19937_64 random(1);
  std::vector<void*> blocks;
  for (std::int64_t i = 0; i < 2 * num_holes; ++i) {
    blocks.push_back(arena->allocate(256 + random() % (64 << 10), nullptr));
  }
  for (std::size_t i = 0; i < blocks.size(); i += 2) arena->free(blocks[i], nullptr);
  return arena;
}

// Arguments: holes, bytes, lanes. Without lanes, and above 32 KiB, every pair goes to the heap.
void hot_pair(benchmark::State& state) {
  const auto arena = make_arena(state.range(0), state.range(2) != 0);
  const auto bytes = std::size_t(state.range(1));
  for (auto _ : state) {
    void* block = arena->allocate(bytes, nullptr);
    benchmark::DoNotOptimize(block);
    arena->free(block, nullptr);
  }
}
BENCHMARK(hot_pair)->ArgsProduct({{64, 4096, 65536}, {1 << 10, 1 << 20}, {0, 1}});

// One random free and one random allocate, sizes 256 B to 64 KiB; median and 99th percentile of
// batches of 16 pairs.
void random_pair(benchmark::State& state) {
  const auto arena = make_arena(state.range(0), true);
  std::mt19937_64 random(2);
  std::vector<void*> live;
  const auto size = [&] { return 256 + random() % (64 << 10); };
  for (int i = 0; i < 65536; ++i) live.push_back(arena->allocate(size(), nullptr));
  std::vector<double> ns;
  constexpr int kBatch = 16;
  for (auto _ : state) {
    std::size_t at[kBatch];
    std::size_t bytes[kBatch];
    for (int i = 0; i < kBatch; ++i) {
      at[i] = random() % live.size();
      bytes[i] = size();
    }
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kBatch; ++i) {
      arena->free(live[at[i]], nullptr);
      live[at[i]] = arena->allocate(bytes[i], nullptr);
    }
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - begin;
    ns.push_back(spent.count() / kBatch);
  }
  std::sort(ns.begin(), ns.end());
  state.counters["pair_p50_ns"] = ns[ns.size() / 2];
  state.counters["pair_p99_ns"] = ns[ns.size() * 99 / 100];
}
BENCHMARK(random_pair)->Arg(64)->Arg(65536)->Iterations(20000);

// Threads allocate and free small blocks on their own streams.
void threads_pair(benchmark::State& state) {
  static fastgpt::Arena arena(fastgpt::make_host_upstream(), kGiB);
  const std::size_t bytes = 1024;
  for (auto _ : state) {
    void* block = arena.allocate(bytes, nullptr);
    benchmark::DoNotOptimize(block);
    arena.free(block, nullptr);
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(threads_pair)->ThreadRange(1, 16)->UseRealTime();

}  // namespace
