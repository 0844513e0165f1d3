#include <array>
#include <mutex>

#include "device/arch.cuh"
#include "fastgpt/check.h"

namespace fastgpt::device {
namespace {

constexpr int kMaxDevices = 64;

__global__ void probe_kernel() {}

}  // namespace

const Traits& current_traits() {
  static std::array<Traits, kMaxDevices> traits{};
  static std::array<std::once_flag, kMaxDevices> once;
  int device = 0;
  FASTGPT_CUDA_TRY(cudaGetDevice(&device));
  FASTGPT_CHECK(device < kMaxDevices, "device ", device, "; expected less than ", kMaxDevices);
  std::call_once(once[std::size_t(device)], [&] {
    cudaFuncAttributes attributes{};
    FASTGPT_CUDA_TRY(cudaFuncGetAttributes(&attributes, probe_kernel));
    Traits& t = traits[std::size_t(device)];
    t.arch = attributes.ptxVersion;
    FASTGPT_CUDA_TRY(cudaDeviceGetAttribute(&t.num_sms, cudaDevAttrMultiProcessorCount, device));
  });
  return traits[std::size_t(device)];
}

}  // namespace fastgpt::device
