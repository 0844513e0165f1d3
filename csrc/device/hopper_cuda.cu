#include "device/hopper.cuh"
#include "device/once_per_device.cuh"
#include "device/wgmma.cuh"
#include "fastgpt/check.h"

namespace fastgpt::device {
namespace {

// Nobody launches it; its attributes tell which code was loaded. The driver reports 90 for code of
// sm_90a as well as for 9.0's, so the former shows itself by its shared memory.
__global__ void wgmma_probe_kernel() {
#ifdef FASTGPT_HAS_WGMMA
  __shared__ volatile int mark;
  mark = 1;
#endif
}

// A graphics processing cluster has room for a whole number of CTA clusters only.
int max_clusters(int size) {
  constexpr int kBytes = 128 << 10;  // more than half of an SM's
  FASTGPT_CUDA_TRY(cudaFuncSetAttribute(wgmma_probe_kernel,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(size);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = unsigned(size);
  config.blockDim = 256;
  config.dynamicSmemBytes = kBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  FASTGPT_CUDA_TRY(cudaOccupancyMaxActiveClusters(&count, wgmma_probe_kernel, &config));
  return count;
}

}  // namespace

const HopperTraits& hopper_traits() {
  return once_per_device<HopperTraits>([](int) {
    cudaFuncAttributes attributes{};
    FASTGPT_CUDA_TRY(cudaFuncGetAttributes(&attributes, wgmma_probe_kernel));
    HopperTraits t{};
    t.has_wgmma = attributes.sharedSizeBytes > 0;
    for (int size = 1; t.has_wgmma && size <= 8; ++size) t.max_clusters[size] = max_clusters(size);
    return t;
  });
}

}  // namespace fastgpt::device
