#include <cuda_runtime.h>

#include "fastgpt/check.h"
#include "fastgpt/device.h"
#include "fastgpt/upstream.h"

namespace fastgpt {
namespace {

class CudaUpstream final : public Upstream {
 public:
  explicit CudaUpstream(int device) : device_(device) {
    int count = 0;
    FASTGPT_CUDA_TRY(cudaGetDeviceCount(&count));
    FASTGPT_CHECK(device >= 0 && device < count, "device is cuda:", device, "; this machine has ",
                  count, " CUDA devices");
    const CurrentDevice current(device);
    std::size_t unused = 0;
    FASTGPT_CUDA_TRY(cudaMemGetInfo(&unused, &total_bytes_));
  }

  DeviceType device_type() const override { return DeviceType::kCUDA; }
  int device() const override { return device_; }

  void* allocate(std::size_t bytes) override {
    const CurrentDevice current(device_);
    void* data = nullptr;
    const cudaError_t status = cudaMalloc(&data, bytes);
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      return nullptr;
    }
    FASTGPT_CUDA_TRY(status);
    return data;
  }

  // At process exit the driver may be gone before the last tensor: then there is nothing to free.
  void free(void* data, std::size_t) noexcept override {
    int previous = 0;
    if (cudaGetDevice(&previous) != cudaSuccess) return;
    (void)cudaSetDevice(device_);
    (void)cudaFree(data);
    (void)cudaSetDevice(previous);
    (void)cudaGetLastError();
  }

  void fill_zero(void* data, std::size_t bytes, void* stream) override {
    const CurrentDevice current(device_);
    FASTGPT_CUDA_TRY(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
  }

  void copy(void* target, const void* source, std::size_t bytes, void* stream) override {
    const CurrentDevice current(device_);
    FASTGPT_CUDA_TRY(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice,
                                     static_cast<cudaStream_t>(stream)));
  }

  void synchronize(void* stream) override {
    const CurrentDevice current(device_);
    FASTGPT_CUDA_TRY(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
  }

  std::size_t free_bytes() const override {
    const CurrentDevice current(device_);
    std::size_t free = 0;
    std::size_t total = 0;
    FASTGPT_CUDA_TRY(cudaMemGetInfo(&free, &total));
    return free;
  }

  std::size_t total_bytes() const override { return total_bytes_; }

 private:
  const int device_;
  std::size_t total_bytes_ = 0;
};

}  // namespace

std::shared_ptr<Upstream> make_cuda_upstream(int device) {
  return std::make_shared<CudaUpstream>(device);
}

}  // namespace fastgpt
