#include "fastgpt/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fastgpt/check.h"

namespace fastgpt {
namespace {

int affinity_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

// Workers spin for kSpinTime after a job, so that the next operation of a decode step starts within
// a microsecond, then sleep on a condition variable: an idle server uses no processor.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads) : num_threads_(num_threads) {
    for (int i = 1; i < num_threads_; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~ThreadPool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  void run(std::int64_t begin, std::int64_t end, std::int64_t grain,
           const std::function<void(std::int64_t, std::int64_t)>& fn) {
    const std::int64_t total = end - begin;
    const std::int64_t pieces = std::min<std::int64_t>(
        num_threads_, (total + grain - 1) / std::max<std::int64_t>(grain, 1));
    if (pieces <= 1 || !owner_.try_lock()) {
      fn(begin, end);
      return;
    }
    std::lock_guard owner(owner_, std::adopt_lock);
    begin_ = begin;
    end_ = end;
    pieces_ = pieces;
    fn_ = &fn;
    error_ = nullptr;
    pending_.store(num_threads_ - 1, std::memory_order_relaxed);
    {
      std::lock_guard lock(mutex_);  // pairs with the sleeper's check of epoch_
      epoch_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_.notify_all();
    run_piece(0);
    while (pending_.load(std::memory_order_acquire) != 0) __builtin_ia32_pause();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr std::chrono::microseconds kSpinTime{100};
  static constexpr int kSpinsPerLook = 32;  // at the clock

  void run_piece(std::int64_t index) {
    if (index >= pieces_) return;
    const std::int64_t total = end_ - begin_;
    const std::int64_t first = begin_ + total * index / pieces_;
    const std::int64_t last = begin_ + total * (index + 1) / pieces_;
    try {
      (*fn_)(first, last);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void work(int index) {
    inside_ = true;
    std::uint64_t seen = 0;
    for (;;) {
      int spins = 0;
      auto deadline = std::chrono::steady_clock::now() + kSpinTime;
      while (epoch_.load(std::memory_order_acquire) == seen && !stop_.load()) {
        if (++spins % kSpinsPerLook != 0 || std::chrono::steady_clock::now() < deadline) {
          __builtin_ia32_pause();
          continue;
        }
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen || stop_.load(); });
        sleepers_.fetch_sub(1);
        deadline = std::chrono::steady_clock::now() + kSpinTime;
      }
      if (stop_.load()) return;
      seen = epoch_.load(std::memory_order_acquire);
      run_piece(index);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

 public:
  static thread_local bool inside_;  // a worker never waits for its own pool

 private:
  const int num_threads_;
  std::vector<std::thread> workers_;
  std::mutex owner_;  // one parallel_for at a time
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> epoch_{0};
  std::atomic<int> pending_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::int64_t begin_ = 0;
  std::int64_t end_ = 0;
  std::int64_t pieces_ = 0;
  const std::function<void(std::int64_t, std::int64_t)>* fn_ = nullptr;
  std::exception_ptr error_;
};

thread_local bool ThreadPool::inside_ = false;

std::mutex g_mutex;
int g_requested = 0;
std::unique_ptr<ThreadPool> g_pool;

ThreadPool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    std::lock_guard lock(g_mutex);
    g_pool = std::make_unique<ThreadPool>(g_requested > 0 ? g_requested : affinity_cores());
  });
  return *g_pool;
}

}  // namespace

void set_num_threads(int num_threads) {
  FASTGPT_CHECK(num_threads >= 0, "num_threads is ", num_threads, "; expected 0 or more");
  std::lock_guard lock(g_mutex);
  const int wanted = num_threads > 0 ? num_threads : affinity_cores();
  FASTGPT_CHECK(!g_pool || g_pool->num_threads() == wanted, "num_threads is ", num_threads,
                " but the thread pool already runs with ", g_pool ? g_pool->num_threads() : 0,
                "; set it before the first operation");
  g_requested = wanted;
}

int num_threads() { return pool().num_threads(); }

void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& fn) {
  if (begin >= end) return;
  if (ThreadPool::inside_ || end - begin <= grain) {
    fn(begin, end);
    return;
  }
  pool().run(begin, end, grain, fn);
}

}  // namespace fastgpt
