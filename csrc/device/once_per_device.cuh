// What is looked up once per device, host side.
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <mutex>

#include "fastgpt/check.h"

namespace fastgpt::device {

/// The Value of the current device: look_up(device) of the first call there. Each function object
/// type has values of its own. Any thread may call it.
template <class Value, class LookUp>
const Value& once_per_device(const LookUp& look_up) {
  constexpr int kMaxDevices = 64;
  static std::array<Value, kMaxDevices> values{};
  static std::array<std::once_flag, kMaxDevices> once;
  int device = 0;
  FASTGPT_CUDA_TRY(cudaGetDevice(&device));
  FASTGPT_CHECK(device < kMaxDevices, "device ", device, "; expected less than ", kMaxDevices);
  const auto index = std::size_t(device);
  std::call_once(once[index], [&] { values[index] = look_up(device); });
  return values[index];
}

}  // namespace fastgpt::device
