#include <cuda_runtime.h>

#include "fastgpt/device.h"

namespace fastgpt {

CurrentDevice::CurrentDevice(int device) {
  int current = 0;
  FASTGPT_CUDA_TRY(cudaGetDevice(&current));
  if (current == device) return;
  FASTGPT_CUDA_TRY(cudaSetDevice(device));
  previous_ = current;
}

CurrentDevice::~CurrentDevice() {
  if (previous_ >= 0) (void)cudaSetDevice(previous_);
}

}  // namespace fastgpt
