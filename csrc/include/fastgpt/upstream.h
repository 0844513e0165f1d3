// Where a pool gets its memory, and the few things it must ask of a device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "fastgpt/device.h"

namespace fastgpt {

/// One piece of physical memory, mapped and unmapped as a whole.
struct Handle {
  std::uint64_t id = 0;  // 0 = none
  std::size_t bytes = 0;
};

/// A mark in a stream that other streams and the host can wait for.
using Event = void*;

/// One device's memory. Thread-safe. Every pointer is aligned to at least 256 bytes.
///
/// Memory comes in one of two ways. Where the device can map, `reserve` returns address space and
/// handles are mapped into it, so that a pool grows without moving. Where it cannot, `reserve`
/// returns nullptr and `allocate` serves slabs at addresses of the driver's choice.
class Upstream {
 public:
  virtual ~Upstream() = default;
  virtual DeviceType device_type() const = 0;
  virtual int device() const = 0;

  /// Address space of `bytes`, nothing mapped; nullptr where this device cannot map.
  virtual void* reserve(std::size_t bytes) = 0;
  virtual void unreserve(void* address, std::size_t bytes) noexcept = 0;

  /// Handles' sizes, and the addresses they are mapped at, are multiples of this.
  virtual std::size_t granularity() const = 0;

  /// @return a new piece of physical memory; id 0 when the device has no more.
  virtual Handle create(std::size_t bytes) = 0;
  virtual void destroy(Handle handle) noexcept = 0;

  /// Map handles one after another from `address` on. @return false with nothing mapped.
  virtual bool map(void* address, const std::vector<Handle>& handles) = 0;

  /// Unmap one handle; nobody may be using it. @return false with the handle still mapped.
  virtual bool unmap(void* address, Handle handle) noexcept = 0;

  /// A slab of undefined content, or nullptr when the device has no more.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void free(void* data, std::size_t bytes) noexcept = 0;

  /// Whether work on `stream` is done when the call that starts it returns; then it needs no
  /// events.
  virtual bool is_synchronous(void* stream) const = 0;
  virtual void* create_stream() = 0;
  virtual void destroy_stream(void* stream) noexcept = 0;

  virtual Event create_event() = 0;
  virtual void destroy_event(Event event) noexcept = 0;
  /// Mark what is queued on `stream` now; replaces the event's earlier mark.
  virtual void record(Event event, void* stream) = 0;
  /// Let later work on `stream` wait for the event's mark.
  virtual void wait(void* stream, Event event) = 0;
  /// Whether everything before the mark is done.
  virtual bool query(Event event) = 0;
  /// Block the host until everything before the mark is done.
  virtual void synchronize(Event event) = 0;
  /// Block the host until the device is idle, or gone.
  virtual void synchronize_device() noexcept = 0;
  /// Whether `stream` is being captured into a graph: then it may not wait for the outside.
  virtual bool is_capturing(void* stream) = 0;

  /// Fill or move bytes in stream order, in any direction between this device and the host.
  virtual void fill_zero(void* data, std::size_t bytes, void* stream) = 0;
  virtual void copy(void* target, const void* source, std::size_t bytes, void* stream) = 0;

  /// Bytes that create or allocate could still return, and the device's total.
  virtual std::size_t free_bytes() const = 0;
  virtual std::size_t total_bytes() const = 0;
};

/// Ordinary host memory in 2 MiB huge pages where the kernel grants them. Stream nullptr is the
/// caller's thread; created streams are threads of their own.
std::shared_ptr<Upstream> make_host_upstream();

/// Memory of one CUDA device. @throws DeviceError without CUDA, a driver or that device.
std::shared_ptr<Upstream> make_cuda_upstream(int device);

/// Page-locked host memory that a CUDA device copies from and to at the link's rate, in slabs
/// that are kept. @throws DeviceError like make_cuda_upstream.
std::shared_ptr<Upstream> make_pinned_upstream(int device);

}  // namespace fastgpt
