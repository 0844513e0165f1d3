// What a launcher asks of the runtime, host side.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "fastgpt/check.h"

namespace fastgpt::device {

inline int num_multiprocessors(int device) {
  int count = 0;
  FASTGPT_CUDA_TRY(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

/// Architecture (75, 80, 90) whose code of kKernel runs on `device`: what __CUDA_ARCH__ / 10 was.
/// Asked of the runtime, because a library with PTX for 7.5 alone also runs on newer devices.
template <auto kKernel>
int compiled_arch(int device) {
  static std::atomic<int> known[64];
  std::atomic<int>& slot = known[device % 64];
  int arch = slot.load(std::memory_order_relaxed);
  if (arch == 0) {
    cudaFuncAttributes attributes;
    FASTGPT_CUDA_TRY(cudaFuncGetAttributes(&attributes, kKernel));
    arch = attributes.ptxVersion;
    slot.store(arch, std::memory_order_relaxed);
  }
  return arch;
}

/// Let kKernel use up to `bytes` of dynamic shared memory; asks the runtime once per device.
template <auto kKernel>
void allow_shared_bytes(int bytes, int device) {
  if (bytes <= 48 << 10) return;
  static std::atomic<std::uint64_t> done{0};
  const std::uint64_t bit = std::uint64_t(1) << (device % 64);
  if (done.load(std::memory_order_relaxed) & bit) return;
  FASTGPT_CUDA_TRY(
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  done.fetch_or(bit, std::memory_order_relaxed);
}

}  // namespace fastgpt::device
