// Which code of this library a device runs.
#pragma once
#include <cuda_runtime.h>

namespace fastgpt::device {

/// What launchers choose kernels by.
struct Traits {
  int arch;  // compute capability times ten that the code running here was compiled for: 75, 80, 90
  int num_sms;
};

/// Traits of the current device, looked up once per device. arch is read off a compiled kernel, not
/// off the device: a library without code for a device runs there from the PTX of an older one.
const Traits& current_traits();

}  // namespace fastgpt::device
