#include "device/arch.cuh"
#include "device/once_per_device.cuh"
#include "fastgpt/check.h"

namespace fastgpt::device {
namespace {

__global__ void probe_kernel() {}

}  // namespace

const Traits& current_traits() {
  return once_per_device<Traits>([](int device) {
    cudaFuncAttributes attributes{};
    FASTGPT_CUDA_TRY(cudaFuncGetAttributes(&attributes, probe_kernel));
    Traits t{};
    t.arch = attributes.ptxVersion;
    FASTGPT_CUDA_TRY(cudaDeviceGetAttribute(&t.num_sms, cudaDevAttrMultiProcessorCount, device));
    return t;
  });
}

}  // namespace fastgpt::device
