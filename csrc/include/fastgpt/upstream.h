// Where a pool gets its memory, and the few things it must ask of a device.
#pragma once
#include <cstddef>
#include <memory>

#include "fastgpt/device.h"

namespace fastgpt {

/// One device's memory. Thread-safe. Every pointer is aligned to at least 256 bytes.
class Upstream {
 public:
  virtual ~Upstream() = default;
  virtual DeviceType device_type() const = 0;
  virtual int device() const = 0;

  /// @return memory of undefined content, or nullptr when the device has no more.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void free(void* data, std::size_t bytes) noexcept = 0;

  /// Fill or move bytes in stream order; the CPU does it before returning.
  virtual void fill_zero(void* data, std::size_t bytes, void* stream) = 0;
  virtual void copy(void* target, const void* source, std::size_t bytes, void* stream) = 0;

  /// Wait until work queued on `stream` is done.
  virtual void synchronize(void* stream) = 0;

  /// Bytes that allocate could still return, and the device's total.
  virtual std::size_t free_bytes() const = 0;
  virtual std::size_t total_bytes() const = 0;
};

/// Ordinary host memory in 2 MiB huge pages where the kernel grants them.
std::shared_ptr<Upstream> make_host_upstream();

/// Memory of one CUDA device. @throws DeviceError without CUDA, a driver or that device.
std::shared_ptr<Upstream> make_cuda_upstream(int device);

}  // namespace fastgpt
