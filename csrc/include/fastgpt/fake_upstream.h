// A device that exists only in memory, for tests: it runs streams in any order, fails on demand
// and reports what no driver would forgive.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "fastgpt/upstream.h"

namespace fastgpt {

class HappensBefore;

/// Work on a stream is queued, and done only when the test (or a wait on the host) runs it, in any
/// order that events allow. Vector clocks find a missing wait also where the order happened to be
/// right. Memory is real: what is unmapped loses its content and traps. Stream handles are any
/// pointers; nullptr is a stream like the others. A destroyed stream's handle is the next one made.
class FakeUpstream final : public Upstream {
 public:
  struct Options {
    std::size_t capacity_bytes = std::size_t{1} << 30;
    bool can_map = true;
    std::size_t granularity = std::size_t{2} << 20;
    std::uint64_t seed = 0;  // of the order in which streams run
  };
  explicit FakeUpstream(Options options);
  ~FakeUpstream() override;

  // -- the test's side ---------------------------------------------------------------------------

  /// Let the k-th call from now on (1 = the next) that may fail do so, and the `num - 1` after it;
  /// 0 = none.
  /// @param throws calls that can also say that there is no more memory throw DeviceError instead.
  void fail_at(std::uint64_t call, std::uint64_t num = 1, bool throws = false);
  /// Calls so far that may fail.
  std::uint64_t num_calls() const;
  /// Events, and streams, created and not destroyed.
  std::int64_t num_events() const;
  std::int64_t num_streams() const;
  /// Driver calls so far that map, unmap, create, destroy, allocate or free memory.
  std::uint64_t num_memory_calls() const;

  /// Queue a write of `stamp` over the bytes, or a check that they all hold it.
  void write(void* data, std::size_t bytes, std::uint8_t stamp, void* stream);
  void expect(const void* data, std::size_t bytes, std::uint8_t stamp, void* stream);

  /// A program's own order: later work on `then` waits for what is queued on `first` now.
  void order(void* first, void* then);

  /// More than `bytes` mapped in the reservation made next, or beyond it without one, is reported.
  void limit_next_reservation(std::size_t bytes) { next_limit_ = bytes; }

  /// Do up to `steps` queued tasks of streams chosen at random.
  void run(std::size_t steps);
  void run_all();
  void begin_capture(void* stream);
  void end_capture(void* stream);

  /// What went wrong so far: a stamp overwritten, memory unmapped under queued work, ...
  std::vector<std::string> violations() const;
  std::size_t mapped_bytes() const;
  bool is_mapped(const void* data, std::size_t bytes) const;

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
    std::vector<std::uint64_t> clock;
  };
  struct Reservation {
    std::size_t bytes;
    std::size_t limit_bytes;
    std::size_t mapped_bytes;
  };
  using Queue = std::deque<Task>;

  bool fails();
  void may_throw(const char* call);  // where an injected failure throws
  bool refuses(const char* call);    // where it may also say that there is no more
  void push(void* stream, Task task, const std::byte* reads, const std::byte* writes,
            std::size_t bytes);
  void record_locked(FakeEvent& event, void* stream);
  void wait_locked(void* stream, const FakeEvent& event);
  bool step(void* stream);  // one task; false when blocked or empty
  void run_until_reached(std::uint64_t mark);
  void report(std::string what) { violations_.push_back(std::move(what)); }
  bool is_mapped_locked(const std::byte* data, std::size_t bytes) const;
  bool is_reached(std::uint64_t mark) const;
  void retire(const std::byte* data, std::size_t bytes, const char* what);

  const Options options_;
  mutable std::mutex mutex_;
  std::mt19937_64 random_;
  std::uint64_t num_calls_ = 0;
  std::uint64_t num_memory_calls_ = 0;
  std::uint64_t fail_at_ = 0;
  std::uint64_t num_fails_ = 0;
  bool fail_throws_ = false;
  std::uint64_t next_id_ = 1;
  std::uint64_t next_mark_ = 1;
  std::int64_t num_events_ = 0;  // created and not destroyed
  std::int64_t num_streams_ = 0;
  std::size_t used_bytes_ = 0;
  std::map<std::uint64_t, std::size_t> handles_;  // created
  std::map<std::byte*, Handle> mapped_;           // and mapped, or a slab (id 0)
  std::map<std::byte*, Reservation> reservations_;
  std::size_t next_limit_ = ~std::size_t{0};
  std::vector<void*> destroyed_;  // stream handles, the last one is made again first
  std::unique_ptr<HappensBefore> order_;
  std::map<void*, Queue> queues_;
  std::map<std::uint64_t, bool> marks_;  // recorded; true = reached
  std::map<void*, bool> capturing_;
  std::vector<std::string> violations_;
};

}  // namespace fastgpt
