// Which work on a fake device is ordered after which: a race detector for stream programs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace fastgpt {

/// Vector clocks over streams and the host. Judges the order that events and host waits enforce,
/// not the order in which work happened to run: a missing wait is found in every run.
///
/// Source: FastTrack, Flanagan and Freund, PLDI 2009, with streams for threads.
class HappensBefore {
 public:
  /// The latest piece of work of each stream that is known to be over; missing = 0.
  using Clock = std::vector<std::uint64_t>;

  /// Queue one piece of work on a stream, after all that the host has waited for.
  void enqueue(void* stream);
  /// What an event recorded now on `stream` stands for.
  Clock mark(void* stream) { return clock_of(stream); }
  void wait(void* stream, const Clock& mark) { merge(clock_of(stream), mark); }
  void host_waits(const Clock& mark) { merge(host_, mark); }
  void host_waits_for_all();
  /// The handle may come back as another stream.
  void end(void* stream) { ids_.erase(stream); }

  /// The work queued last on `stream` reads or writes bytes. @return what it races with.
  std::optional<std::string> access(void* stream, const std::byte* data, std::size_t bytes,
                                    bool writes);
  /// The host takes the bytes away: it must have waited for whoever used them.
  std::optional<std::string> retire(const std::byte* data, std::size_t bytes);

 private:
  struct Use {
    std::size_t stream;
    std::uint64_t tick;
  };
  struct Segment {
    const std::byte* end;
    std::vector<Use> writes;  // none or one
    std::vector<Use> reads;   // since the write, one a stream
  };

  std::size_t id(void* stream);
  Clock& clock_of(void* stream);
  static void merge(Clock& into, const Clock& from);
  static bool covers(const Clock& clock, const Use& use) {
    return use.stream < clock.size() && clock[use.stream] >= use.tick;
  }
  void split_at(const std::byte* at);

  std::map<void*, std::size_t> ids_;
  std::vector<Clock> clocks_;
  Clock host_;
  std::map<const std::byte*, Segment> segments_;  // by first byte
};

}  // namespace fastgpt
