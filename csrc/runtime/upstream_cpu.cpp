#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "fastgpt/upstream.h"

namespace fastgpt {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPage = 4096;

/// What can be had without swapping. A virtual machine whose memory grows with use may name no
/// MemAvailable, or 0: then the free pages.
std::size_t available_bytes() {
  const std::size_t free_bytes =
      std::size_t(sysconf(_SC_AVPHYS_PAGES)) * std::size_t(sysconf(_SC_PAGESIZE));
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  std::size_t kib = 0;
  std::string unit;
  while (meminfo >> key >> kib && std::getline(meminfo, unit)) {
    if (key == "MemAvailable:") return std::max(free_bytes, kib << 10);
  }
  return free_bytes;
}

/// One point in a stream's work, reached once.
class Mark {
 public:
  void reach() {
    std::lock_guard lock(mutex_);
    is_reached_ = true;
    reached_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    reached_.wait(lock, [this] { return is_reached_; });
  }
  bool is_reached() {
    std::lock_guard lock(mutex_);
    return is_reached_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable reached_;
  bool is_reached_ = false;
};

struct HostEvent {
  std::shared_ptr<Mark> mark;  // null: never recorded, so nothing to wait for
};

/// A thread that does what is queued, in order.
class HostStream {
 public:
  HostStream() : thread_([this] { work(); }) {}
  ~HostStream() {
    push(nullptr);
    thread_.join();
  }
  HostStream(const HostStream&) = delete;
  HostStream& operator=(const HostStream&) = delete;

  void push(std::function<void()> task) {
    std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    queued_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock lock(mutex_);
      queued_.wait(lock, [this] { return !tasks_.empty(); });
      const auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      if (task == nullptr) return;
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable queued_;
  std::deque<std::function<void()>> tasks_;
  std::thread thread_;  // last: it starts when the rest is there
};

void queue(void* stream, std::function<void()> task) {
  if (stream == nullptr) return task();
  static_cast<HostStream*>(stream)->push(std::move(task));
}

class HostUpstream final : public Upstream {
 public:
  DeviceType device_type() const override { return DeviceType::kCPU; }
  int device() const override { return 0; }

  // One huge page too long, so that the start can be aligned: streaming weights through 4 KiB
  // pages costs a page walk every 4 KiB.
  void* reserve(std::size_t bytes) override {
    const std::size_t length = round_up(bytes, kHugePage);
    void* raw = mmap(nullptr, length + kHugePage, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    auto* base = static_cast<std::byte*>(raw);
    const std::size_t head =
        (kHugePage - reinterpret_cast<std::uintptr_t>(base) % kHugePage) % kHugePage;
    if (head > 0) munmap(base, head);
    if (head < kHugePage) munmap(base + head + length, kHugePage - head);
    madvise(base + head, length, MADV_HUGEPAGE);  // refused: ordinary pages serve as well
    return base + head;
  }
  void unreserve(void* address, std::size_t bytes) noexcept override {
    munmap(address, round_up(bytes, kHugePage));
  }

  std::size_t granularity() const override { return kPage; }

  // The kernel finds the pages when they are touched: a handle is a promise.
  Handle create(std::size_t bytes) override { return {1, bytes}; }
  void destroy(Handle) noexcept override {}

  bool map(void* address, const std::vector<Handle>& handles) override {
    std::size_t bytes = 0;
    for (const Handle handle : handles) bytes += handle.bytes;
    return mprotect(address, bytes, PROT_READ | PROT_WRITE) == 0;
  }
  bool unmap(void* address, Handle handle) noexcept override {
    return madvise(address, handle.bytes, MADV_DONTNEED) == 0 &&
           mprotect(address, handle.bytes, PROT_NONE) == 0;
  }

  void* allocate(std::size_t bytes) override {
    void* data = mmap(nullptr, round_up(bytes, kPage), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }
  void free(void* data, std::size_t bytes) noexcept override {
    munmap(data, round_up(bytes, kPage));
  }

  bool is_synchronous(void* stream) const override { return stream == nullptr; }
  void* create_stream() override { return new HostStream; }
  void destroy_stream(void* stream) noexcept override { delete static_cast<HostStream*>(stream); }

  Event create_event() override { return new HostEvent; }
  void destroy_event(Event event) noexcept override { delete static_cast<HostEvent*>(event); }
  void record(Event event, void* stream) override {
    auto mark = std::make_shared<Mark>();
    static_cast<HostEvent*>(event)->mark = mark;
    queue(stream, [mark] { mark->reach(); });
  }
  void wait(void* stream, Event event) override {
    if (auto mark = static_cast<HostEvent*>(event)->mark) queue(stream, [mark] { mark->wait(); });
  }
  bool query(Event event) override {
    const auto mark = static_cast<HostEvent*>(event)->mark;
    return mark == nullptr || mark->is_reached();
  }
  void synchronize(Event event) override {
    if (const auto mark = static_cast<HostEvent*>(event)->mark) mark->wait();
  }
  void synchronize_device() noexcept override {}  // streams end with the work they were given
  bool is_capturing(void*) override { return false; }

  void fill_zero(void* data, std::size_t bytes, void* stream) override {
    queue(stream, [=] { std::memset(data, 0, bytes); });
  }
  void copy(void* target, const void* source, std::size_t bytes, void* stream) override {
    queue(stream, [=] { std::memcpy(target, source, bytes); });
  }

  std::size_t free_bytes() const override { return available_bytes(); }
  std::size_t total_bytes() const override {
    return std::size_t(sysconf(_SC_PHYS_PAGES)) * std::size_t(sysconf(_SC_PAGESIZE));
  }

 private:
  static std::size_t round_up(std::size_t bytes, std::size_t to) {
    return (std::max<std::size_t>(bytes, 1) + to - 1) / to * to;
  }
};

}  // namespace

std::shared_ptr<Upstream> make_host_upstream() { return std::make_shared<HostUpstream>(); }

#ifndef FASTGPT_WITH_CUDA
namespace {

[[noreturn]] void fail_without_cuda(int device) {
  detail::fail<DeviceError>(__FILE__, __LINE__, "cuda:", device,
                            " was asked for, but this build has no CUDA; rebuild with nvcc and "
                            "FASTGPT_CUDA=1");
}

}  // namespace

std::shared_ptr<Upstream> make_cuda_upstream(int device) { fail_without_cuda(device); }
std::shared_ptr<Upstream> make_pinned_upstream(int device) { fail_without_cuda(device); }
#endif

}  // namespace fastgpt
