// A device that exists only in memory, for tests: it runs streams in any order, fails on demand
// and reports what no driver would forgive.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "fastgpt/upstream.h"

namespace fastgpt {

/// Work on a stream is queued, and done only when the test (or a wait on the host) runs it, so a
/// missing wait shows as wrong bytes. Memory is real: what is unmapped loses its content and
/// traps. Stream handles are any pointers; nullptr is a stream like the others.
class FakeUpstream final : public Upstream {
 public:
  struct Options {
    std::size_t capacity_bytes = std::size_t{1} << 30;
    bool can_map = true;
    std::size_t granularity = std::size_t{2} << 20;
    std::uint64_t seed = 0;  // of the order in which streams run
  };
  explicit FakeUpstream(Options options) : options_(options), random_(options.seed) {}
  ~FakeUpstream() override;

  // -- the test's side ---------------------------------------------------------------------------

  /// Let the k-th call from now on (1 = the next) that may fail do so; 0 = none.
  void fail_at(std::uint64_t call);
  /// Calls so far that may fail.
  std::uint64_t num_calls() const;
  /// Driver calls so far that map, unmap, create, destroy, allocate or free memory.
  std::uint64_t num_memory_calls() const;

  /// Queue a write of `stamp` over the bytes, or a check that they all hold it.
  void write(void* data, std::size_t bytes, std::uint8_t stamp, void* stream);
  void expect(const void* data, std::size_t bytes, std::uint8_t stamp, void* stream);

  /// Do up to `steps` queued tasks of streams chosen at random.
  void run(std::size_t steps);
  void run_all();
  void begin_capture(void* stream);
  void end_capture(void* stream);

  /// What went wrong so far: a stamp overwritten, memory unmapped under queued work, ...
  std::vector<std::string> violations() const;
  std::size_t mapped_bytes() const;

  // -- Upstream ----------------------------------------------------------------------------------

  DeviceType device_type() const override { return DeviceType::kCPU; }
  int device() const override { return 0; }
  void* reserve(std::size_t bytes) override;
  void unreserve(void* address, std::size_t bytes) noexcept override;
  std::size_t granularity() const override { return options_.granularity; }
  Handle create(std::size_t bytes) override;
  void destroy(Handle handle) noexcept override;
  bool map(void* address, const std::vector<Handle>& handles) override;
  bool unmap(void* address, Handle handle) noexcept override;
  void* allocate(std::size_t bytes) override;
  void free(void* data, std::size_t bytes) noexcept override;
  bool is_synchronous(void*) const override { return false; }
  void* create_stream() override;
  void destroy_stream(void* stream) noexcept override;
  Event create_event() override;
  void destroy_event(Event event) noexcept override;
  void record(Event event, void* stream) override;
  void wait(void* stream, Event event) override;
  bool query(Event event) override;
  void synchronize(Event event) override;
  void synchronize_device() noexcept override;
  bool is_capturing(void* stream) override;
  void fill_zero(void* data, std::size_t bytes, void* stream) override;
  void copy(void* target, const void* source, std::size_t bytes, void* stream) override;
  std::size_t free_bytes() const override;
  std::size_t total_bytes() const override { return options_.capacity_bytes; }

 private:
  struct Task {
    std::function<void()> act;
    std::uint64_t waits_for = 0;  // mark that must be reached first; 0 = none
    const std::byte* data = nullptr;
    std::size_t bytes = 0;
    const std::byte* more_data = nullptr;  // the other side of a copy
  };
  struct FakeEvent {
    std::uint64_t mark = 0;
  };
  using Queue = std::deque<Task>;

  bool fails();
  void push(void* stream, Task task);
  bool step(void* stream);  // one task; false when blocked or empty
  void run_until_reached(std::uint64_t mark);
  void report(std::string what) { violations_.push_back(std::move(what)); }
  bool is_mapped(const std::byte* data, std::size_t bytes) const;
  bool is_reached(std::uint64_t mark) const;
  void forbid_queued_use(const std::byte* data, std::size_t bytes, const char* what);

  const Options options_;
  mutable std::mutex mutex_;
  std::mt19937_64 random_;
  std::uint64_t num_calls_ = 0;
  std::uint64_t num_memory_calls_ = 0;
  std::uint64_t fail_at_ = 0;
  std::uint64_t next_id_ = 1;
  std::uint64_t next_mark_ = 1;
  std::size_t used_bytes_ = 0;
  std::map<std::uint64_t, std::size_t> handles_;  // created
  std::map<std::byte*, Handle> mapped_;           // and mapped, or a slab (id 0)
  std::map<void*, Queue> queues_;
  std::map<std::uint64_t, bool> marks_;  // recorded; true = reached
  std::map<void*, bool> capturing_;
  std::vector<std::string> violations_;
};

}  // namespace fastgpt
