// Which stream has waited for which: fences instead of an event per free.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "fastgpt/upstream.h"
#include "memory/block.h"

namespace fastgpt::memory {

/// Orders reuse across streams. Not thread-safe: the arena's lock guards it.
///
/// Every free takes a tick. A fence (streams, tick) is passed by stream s when, for each stream t
/// of the fence, s is t, or s waited for an event recorded on t at or after min(tick, t's last
/// tick). A stream's event is recorded when somebody first has to wait, and then covers all its
/// frees so far: so a hundred frees on one stream cost another stream one record and one wait.
class StreamOrder {
 public:
  explicit StreamOrder(std::shared_ptr<Upstream> upstream) : upstream_(std::move(upstream)) {}
  ~StreamOrder();
  StreamOrder(const StreamOrder&) = delete;
  StreamOrder& operator=(const StreamOrder&) = delete;

  /// The bit of a stream, for Block::streams; 0 where the stream is synchronous. A use counts as
  /// one more tick of the stream.
  std::uint32_t use(void* stream);

  /// The fence of memory that is freed now on `stream` after the streams of `others` used it.
  Fence free(void* stream, std::uint32_t others);
  /// The same where `streams`, as bits, are all that used it.
  Fence free(std::uint32_t streams);

  /// Let `stream` wait until it passes the fence. @return false where that is impossible now: the
  /// stream, or one that it would wait for, is being captured into a graph.
  bool wait(Fence fence, void* stream);
  /// Whether `stream` would pass the fence without waiting.
  bool passes(Fence fence, void* stream);

  /// Block the host until the fence is over. @return false if a stream of it is captured.
  bool wait_on_host(Fence fence);
  /// Whether the fence is known to be over.
  bool is_over(Fence fence) const;
  /// Ask each stream with unfinished frees how far it is.
  void poll() noexcept;

  /// Forget a stream that will be destroyed; its last event is recorded now.
  void release(void* stream);

  std::uint64_t num_waits() const { return num_waits_; }
  std::uint64_t num_records() const { return num_records_; }

 private:
  static constexpr int kMaxStreams = 32;
  struct Slot {
    bool is_used = false;
    bool is_released = false;  // destroyed by its owner: nothing more is recorded on it
    void* stream = nullptr;
    Event event = nullptr;
    std::uint64_t last = 0;                           // tick of the latest free or use
    std::uint64_t recorded = 0;                       // tick that the event covers
    std::uint64_t over = 0;                           // tick known to be done
    std::array<std::uint64_t, kMaxStreams> waited{};  // tick of each other stream waited for
  };

  int slot(void* stream);
  int find(void* stream) const;
  int reclaim_slot();
  std::uint64_t needed(const Slot& other, Fence fence) const;
  bool record_up_to(Slot& other, std::uint64_t tick);

  const std::shared_ptr<Upstream> upstream_;
  std::array<Slot, kMaxStreams> slots_{};
  mutable int latest_ = 0;
  std::uint64_t clock_ = 0;
  std::uint64_t num_waits_ = 0;
  std::uint64_t num_records_ = 0;
};

}  // namespace fastgpt::memory
