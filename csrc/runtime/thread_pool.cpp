#include "fastgpt/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <bit>
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
    for (int i = 1; i < num_threads_; ++i) workers_.emplace_back([this] { work(); });
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
    fn_ = &fn;
    error_ = nullptr;
    unfinished_.store(pieces, std::memory_order_relaxed);
    const Ticket ticket{Ticket::of(ticket_.load()).job + 1, std::uint16_t(pieces), 0};
    {
      std::lock_guard lock(mutex_);  // pairs with the sleeper's check of ticket_
      ticket_.store(ticket.packed());
    }
    if (sleepers_.load() > 0) wake_.notify_all();
    inside_ = true;
    run_pieces(ticket.job);
    inside_ = false;
    for (int spins = 1; unfinished_.load(std::memory_order_acquire) != 0; ++spins) {
      __builtin_ia32_pause();
      if (spins % kSpinsPerYield == 0) std::this_thread::yield();  // a worker may want this core
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr std::chrono::microseconds kSpinTime{100};
  static constexpr int kSpinsPerLook = 32;  // at the clock
  static constexpr int kSpinsPerYield = 1024;

  // What is left of the current job, in one word: a piece belongs to who moves `next` past it.
  struct Ticket {
    std::uint32_t job;
    std::uint16_t pieces;
    std::uint16_t next;

    static Ticket of(std::uint64_t packed) { return std::bit_cast<Ticket>(packed); }
    std::uint64_t packed() const { return std::bit_cast<std::uint64_t>(*this); }
  };

  // Take pieces of this job until none is left. Nobody waits for a thread that has not begun: on a
  // busy machine the others do its share, where a fixed share would cost a time slice of the
  // kernel's an operation. While a taken piece is unfinished, run() does not touch the job.
  void run_pieces(std::uint32_t job) {
    std::uint64_t packed = ticket_.load();
    for (;;) {
      Ticket ticket = Ticket::of(packed);
      if (ticket.job != job || ticket.next == ticket.pieces) return;
      const std::int64_t index = ticket.next++;
      if (!ticket_.compare_exchange_weak(packed, ticket.packed())) continue;
      run_piece(index, ticket.pieces);
      unfinished_.fetch_sub(1, std::memory_order_acq_rel);
      packed = ticket_.load();
    }
  }

  void run_piece(std::int64_t index, std::int64_t pieces) {
    const std::int64_t total = end_ - begin_;
    const std::int64_t first = begin_ + total * index / pieces;
    const std::int64_t last = begin_ + total * (index + 1) / pieces;
    try {
      (*fn_)(first, last);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::uint32_t current_job() const { return Ticket::of(ticket_.load()).job; }

  void work() {
    inside_ = true;
    std::uint32_t seen = 0;
    for (;;) {
      int spins = 0;
      auto deadline = std::chrono::steady_clock::now() + kSpinTime;
      while (current_job() == seen && !stop_.load()) {
        if (++spins % kSpinsPerLook != 0 || std::chrono::steady_clock::now() < deadline) {
          __builtin_ia32_pause();
          continue;
        }
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return current_job() != seen || stop_.load(); });
        sleepers_.fetch_sub(1);
        deadline = std::chrono::steady_clock::now() + kSpinTime;
      }
      if (stop_.load()) return;
      seen = current_job();
      run_pieces(seen);
    }
  }

 public:
  static thread_local bool inside_;  // a thread never waits for the pool it works in

 private:
  const int num_threads_;
  std::vector<std::thread> workers_;
  std::mutex owner_;  // one parallel_for at a time
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> ticket_{0};
  std::atomic<std::int64_t> unfinished_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::int64_t begin_ = 0;
  std::int64_t end_ = 0;
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
