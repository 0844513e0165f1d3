// Running a model that is larger than its device's memory: its parts pass through one window.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

#include "fastgpt/upstream.h"

namespace fastgpt {

/// Copies parts of a model from host memory into one window of device memory, in the order in
/// which every pass over the model uses them, while the parts before them compute.
///
/// Even parts lie at the window's front, odd ones at its end:
///
///     | part 0, 2, 4 ... |        | ... part 1, 3, 5 |
///
/// so a part is copied while the one before it is used, and as soon as the one two before it is
/// not. Every part has the same address in every pass, so tensors and CUDA graphs may hold it; it
/// is valid between acquire and release. Mapping memory anew for each part would take the driver
/// milliseconds while kernels run (benchmarks/NOTES.md); a pass makes no driver call for memory
/// and never blocks the host of a CUDA device.
///
/// A pass begins with begin and may be captured into a CUDA graph, copies included: it depends on
/// earlier work only through the stream given to begin. One thread at a time calls a window.
class WeightWindow {
 public:
  struct Piece {
    const void* host;   // page-locked for a CUDA device; stays valid and unchanged
    std::size_t bytes;  // > 0
  };
  using Part = std::vector<Piece>;

  /// Bytes a window needs for these parts: the largest two neighbours, pieces aligned to 256.
  static std::size_t bytes_for(const std::vector<Part>& parts);

  /// @param window memory of `bytes` that outlives the window object.
  /// @param chunk_bytes of one copy at most.
  /// @throws InvalidArgument if there is no part, a part is empty, or `bytes` is too small.
  WeightWindow(std::shared_ptr<Upstream> upstream, void* window, std::size_t bytes,
               std::vector<Part> parts, std::size_t chunk_bytes = std::size_t{32} << 20);
  ~WeightWindow();
  WeightWindow(const WeightWindow&) = delete;
  WeightWindow& operator=(const WeightWindow&) = delete;

  /// Where a piece lies while its part is acquired.
  void* address(std::size_t part, std::size_t piece) const;

  /// Start a pass: the first copies wait for what is queued on `stream` now. A pass that was
  /// given up halfway is forgotten.
  void begin(void* stream);
  /// Let later work on `stream` wait for a part. @throws InvalidArgument if it is not its turn.
  void acquire(std::size_t part, void* stream);
  /// Say that all work with the part is queued on `stream`.
  void release(std::size_t part, void* stream);

  std::size_t num_parts() const { return parts_.size(); }
  /// Bytes copied in one pass.
  std::size_t bytes_per_pass() const;

 private:
  struct Placed {
    Part pieces;
    std::vector<std::size_t> offsets;
    Event ready = nullptr;
    Event released = nullptr;
  };
  void copy_what_fits();
  void close() noexcept;

  const std::shared_ptr<Upstream> upstream_;
  std::byte* const window_;
  const std::size_t chunk_bytes_;
  std::vector<Placed> parts_;
  Event begun_ = nullptr;
  void* copies_ = nullptr;      // stream
  std::size_t num_copied_ = 0;  // parts whose copies are queued
  std::size_t num_released_ = 0;
  std::size_t num_acquired_ = 0;
};

}  // namespace fastgpt
