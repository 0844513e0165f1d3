// A log of what a memory pool did, to be replayed by benchmarks/memory_trace.py.
#pragma once
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

namespace fastgpt {

/// One JSON object a line, in the order of the calls' ends:
///     {"t_us": 12.345, "op": "allocate", "id": 140001, "bytes": 1000, "stream": 0, "thread": 0,
///      "name": ""}
/// t_us      microseconds since start
/// stream    number by first appearance; thread: too, one that ended may hand its number on
/// id        the block's address, which no other live block has; 0 where an op has no block
/// bytes     as asked for; 0 where an op has no size
/// op        of the arena: allocate, free, grow, record_use, evict, restore, trim, release_stream
///           of names: named (an entry lives at id), forget (the name is gone), acquire, release,
///           pin, unpin, freeze, thaw
/// The arena's ops alone are the whole use of memory; names say what it was for.
///
/// Thread-safe. While it is off it costs one load and one branch.
class Trace {
 public:
  Trace() = default;
  ~Trace() { stop(); }
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  /// @throws InvalidArgument if the file cannot be written, or a trace is running.
  void start(const std::string& path);
  /// Complete the file. Nothing is running: nothing.
  void stop() noexcept;

  bool is_on() const { return is_on_.load(std::memory_order_relaxed); }
  void record(const char* op, const void* id, std::size_t bytes, const void* stream,
              std::string_view name = {}) {
    if (is_on()) [[unlikely]] {
      write(op, id, bytes, stream, name);
    }
  }

 private:
  void write(const char* op, const void* id, std::size_t bytes, const void* stream,
             std::string_view name);

  std::atomic<bool> is_on_{false};
  std::mutex mutex_;
  std::FILE* file_ = nullptr;
  std::chrono::steady_clock::time_point began_;
  std::map<const void*, std::size_t> streams_;
  std::map<std::thread::id, std::size_t> threads_;
};

}  // namespace fastgpt
