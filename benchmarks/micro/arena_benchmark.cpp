// How long does a hot allocate + free pair of the arena take, and how does it grow with holes?
#include <benchmark/benchmark.h>

#include <vector>

#include "fastgpt/arena.h"

namespace {

constexpr std::size_t kGiB = std::size_t{1} << 30;

void hot_pair(benchmark::State& state) {
  fastgpt::Arena arena(fastgpt::make_host_upstream(), kGiB);
  std::vector<void*> blocks;
  for (std::int64_t i = 0; i < 2 * state.range(0); ++i) {
    blocks.push_back(arena.allocate(1024, nullptr));
  }
  for (std::size_t i = 0; i < blocks.size(); i += 2) arena.free(blocks[i], nullptr);  // holes
  for (auto _ : state) {
    void* block = arena.allocate(1024, nullptr);
    benchmark::DoNotOptimize(block);
    arena.free(block, nullptr);
  }
}
BENCHMARK(hot_pair)->Arg(64)->Arg(4096)->Arg(65536);

}  // namespace
