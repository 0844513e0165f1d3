// What does it cost to grow the arena on a GPU, and who waits for it?
//
//   nvcc -std=c++20 -O3 -arch=native -DFASTGPT_WITH_CUDA -Icsrc -Icsrc/include
//       benchmarks/micro/growth_benchmark.cu csrc/memory/*.cpp csrc/runtime/upstream_cpu.cpp
//       csrc/runtime/upstream_cuda.cu csrc/runtime/current_device_cuda.cu -o growth_benchmark
//   ./growth_benchmark
//
// 1. growth by 1 GiB, idle and while a kernel runs, by the size of a handle;
// 2. host time of kernel and graph launches while another thread commits memory under a kernel;
// 3. the longest allocate of a thread that needs 8 MiB at a time under a kernel, with memory
//    committed ahead of it and without;
// 4. the driver's calls for 15 GiB of handles, each kind together, and page-locking 2 GiB of host
//    memory by one thread and by more.
// Times in us (median, 99th percentile, longest); the last line is JSON.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "fastgpt/arena.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kGiB = std::size_t{1} << 30;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

double us_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

std::string json = "{";

void report(const std::string& name, std::vector<double> us) {
  std::sort(us.begin(), us.end());
  const auto at = [&](double q) { return us[std::size_t(q * double(us.size() - 1))]; };
  std::printf("%-60s%10.1f%10.1f%10.1f\n", name.c_str(), at(0.5), at(0.99), us.back());
  std::fflush(stdout);
  char text[256];
  std::snprintf(text, sizeof(text), "%s\"%s\": [%.1f, %.1f, %.1f]", json.size() > 1 ? ", " : "",
                name.c_str(), at(0.5), at(0.99), us.back());
  json += text;
}

// One CTA an SM, busy until told to stop.
__global__ void spin(const volatile int* stop) {
  while (*stop == 0) {
  }
}

__global__ void touch(int* count) { atomicAdd(count, 1); }

/// A kernel that runs from construction to destruction.
class Load {
 public:
  explicit Load(bool is_on) : is_on_(is_on) {
    if (!is_on_) return;
    check(cudaHostAlloc(&stop_, sizeof(int), cudaHostAllocMapped));
    *stop_ = 0;
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    spin<<<64, 128, 0, stream_>>>(stop_);
    check(cudaGetLastError());
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  ~Load() {
    if (!is_on_) return;
    *static_cast<volatile int*>(stop_) = 1;
    check(cudaStreamSynchronize(stream_));
    check(cudaStreamDestroy(stream_));
    check(cudaFreeHost(stop_));
  }
  Load(const Load&) = delete;
  Load& operator=(const Load&) = delete;

 private:
  const bool is_on_;
  int* stop_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

void growth(std::size_t handle_bytes, bool under_load) {
  fastgpt::Arena arena(fastgpt::make_cuda_upstream(0), 8 * kGiB, {.handle_bytes = handle_bytes});
  std::vector<double> us;
  {
    const Load load(under_load);
    for (int i = 0; i < 6; ++i) {
      const auto begin = Clock::now();
      arena.allocate(kGiB, nullptr);
      us.push_back(us_since(begin));
    }
  }
  report("grow 1 GiB, handles of " + std::to_string(handle_bytes / kMiB) + " MiB" +
             (under_load ? ", kernel running" : ""),
         us);
}

// Launch one kernel, or a graph of 30, about every 50 us, while another thread commits or not.
void launches(bool commits) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  int* count = nullptr;
  check(cudaMalloc(&count, sizeof(int)));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  for (int i = 0; i < 30; ++i) touch<<<1, 1, 0, stream>>>(count);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphLaunch(exec, stream));
  check(cudaStreamSynchronize(stream));

  fastgpt::Arena arena(fastgpt::make_cuda_upstream(0), 32 * kGiB, {.handle_bytes = 64 * kMiB});
  std::vector<double> kernel_us;
  std::vector<double> graph_us;
  std::vector<double> commit_us;
  std::vector<double> during_us;  // launches that overlap a commit
  {
    const Load load(true);
    std::atomic<bool> stop{false};
    std::atomic<int> committing{0};
    std::thread committer([&] {
      for (int i = 0; commits && i < 200 && !stop; ++i) {
        ++committing;
        const auto begin = Clock::now();
        arena.allocate(64 * kMiB, nullptr);
        commit_us.push_back(us_since(begin));
        --committing;
        std::this_thread::sleep_for(std::chrono::microseconds(500));
      }
    });
    const auto until = Clock::now() + std::chrono::milliseconds(600);
    while (Clock::now() < until) {
      for (auto* times : {&kernel_us, &graph_us}) {
        const bool overlaps = committing > 0;
        const auto begin = Clock::now();
        if (times == &kernel_us) {
          touch<<<1, 1, 0, stream>>>(count);
        } else {
          check(cudaGraphLaunch(exec, stream));
        }
        times->push_back(us_since(begin));
        if (overlaps) during_us.push_back(times->back());
      }
      const auto wait_until = Clock::now() + std::chrono::microseconds(50);
      while (Clock::now() < wait_until) {
      }
      // Bounded queues: launches must not wait for earlier ones.
      if (kernel_us.size() % 16 == 0) check(cudaStreamSynchronize(stream));
    }
    stop = true;
    committer.join();
  }
  const std::string when = commits ? ", another thread commits" : "";
  report("launch a kernel" + when, kernel_us);
  report("launch a graph of 30 kernels" + when, graph_us);
  if (commits) {
    report("commit 64 MiB, kernel running", commit_us);
    if (!during_us.empty()) report("launches that began during a commit", during_us);
  }
  check(cudaGraphExecDestroy(exec));
  check(cudaGraphDestroy(graph));
  check(cudaFree(count));
  check(cudaStreamDestroy(stream));
}

void foreground(std::size_t ahead_bytes, std::size_t handle_bytes) {
  fastgpt::Arena arena(fastgpt::make_cuda_upstream(0), 16 * kGiB,
                       {.handle_bytes = handle_bytes, .ahead_bytes = ahead_bytes});
  arena.allocate(kMiB, nullptr);
  std::vector<double> us;
  {
    const Load load(true);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    for (int i = 0; i < 256; ++i) {  // 2 GiB at 8 GiB a second
      const auto begin = Clock::now();
      arena.allocate(8 * kMiB, nullptr);
      us.push_back(us_since(begin));
      std::this_thread::sleep_for(std::chrono::microseconds(900));
    }
  }
  report("allocate 8 MiB, " + std::to_string(ahead_bytes / kMiB) + " MiB ahead by " +
             std::to_string(handle_bytes / kMiB),
         us);
}

// Calls for `count` handles, mapped and given access together.
void handle_calls(std::size_t handle_bytes, int count) {
  const auto upstream = fastgpt::make_cuda_upstream(0);
  const std::size_t bytes = handle_bytes * std::size_t(count);
  auto* const base = static_cast<std::byte*>(upstream->reserve(bytes));
  std::vector<double> create_us, map_us, unmap_us, destroy_us;
  for (int round = 0; round < 3; ++round) {
    std::vector<fastgpt::Handle> handles;
    auto begin = Clock::now();
    for (int i = 0; i < count; ++i) handles.push_back(upstream->create(handle_bytes));
    create_us.push_back(us_since(begin));
    begin = Clock::now();
    if (!upstream->map(base, handles)) std::exit(1);
    map_us.push_back(us_since(begin));
    begin = Clock::now();
    for (int i = 0; i < count; ++i) {
      if (!upstream->unmap(base + std::size_t(i) * handle_bytes, handles[std::size_t(i)])) {
        std::exit(1);
      }
    }
    unmap_us.push_back(us_since(begin));
    begin = Clock::now();
    for (const fastgpt::Handle handle : handles) upstream->destroy(handle);
    destroy_us.push_back(us_since(begin));
  }
  upstream->unreserve(base, bytes);
  const std::string what =
      std::to_string(count) + " handles of " + std::to_string(handle_bytes / kMiB) + " MiB: ";
  report(what + "create", create_us);
  report(what + "map, set access", map_us);
  report(what + "unmap", unmap_us);
  report(what + "release", destroy_us);
}

void page_locking(int num_threads) {
  const auto upstream = fastgpt::make_pinned_upstream(0);
  const std::size_t bytes = 2 * kGiB / std::size_t(num_threads);
  std::vector<void*> blocks(std::size_t(num_threads), nullptr);
  const auto begin = Clock::now();
  std::vector<std::thread> threads;
  for (void*& block : blocks) {
    threads.emplace_back([&] { block = upstream->allocate(bytes); });
  }
  for (std::thread& thread : threads) thread.join();
  report("page-lock 2 GiB, threads: " + std::to_string(num_threads), {us_since(begin)});
  for (void* block : blocks) upstream->free(block, bytes);
}

}  // namespace

int main() {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s\n%-60s%10s%10s%10s\n", properties.name, "us", "median", "p99", "longest");
  check(cudaFree(nullptr));
  for (const bool under_load : {false, true}) {
    for (const std::size_t handle_mib : {2, 64, 128, 256, 1024}) {
      if (handle_mib == 2 && under_load) continue;  // 512 handles: minutes
      growth(handle_mib * kMiB, under_load);
    }
  }
  launches(false);
  launches(true);
  foreground(0, 64 * kMiB);
  foreground(64 * kMiB, 64 * kMiB);
  foreground(256 * kMiB, 64 * kMiB);
  foreground(256 * kMiB, 256 * kMiB);
  handle_calls(76 * kMiB, 200);
  handle_calls(256 * kMiB, 60);
  for (const int num_threads : {1, 4, 8}) page_locking(num_threads);
  std::printf("%s}\n", json.c_str());
}
