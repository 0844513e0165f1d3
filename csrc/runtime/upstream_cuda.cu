#include <cuda.h>
#include <cuda_runtime.h>

#include "fastgpt/check.h"
#include "fastgpt/device.h"
#include "fastgpt/upstream.h"

namespace fastgpt {
namespace {

/// Lets this thread call the driver while some stream is captured: none of our calls touches it.
class CaptureGuard {
 public:
  CaptureGuard() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~CaptureGuard() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  CaptureGuard(const CaptureGuard&) = delete;
  CaptureGuard& operator=(const CaptureGuard&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// The driver's functions for virtual memory, found at run time: nothing links libcuda.
struct DriverFunctions {
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) unreserve = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuDeviceGetAttribute) attribute = nullptr;

  DriverFunctions() {
    find("cuMemAddressReserve", reserve);
    find("cuMemAddressFree", unreserve);
    find("cuMemCreate", create);
    find("cuMemRelease", release);
    find("cuMemMap", map);
    find("cuMemSetAccess", set_access);
    find("cuMemUnmap", unmap);
    find("cuMemGetAllocationGranularity", granularity);
    find("cuDeviceGetAttribute", attribute);
  }

 private:
  template <class Function>
  static void find(const char* name, Function& function) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    FASTGPT_CUDA_TRY(
        cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
      detail::fail<DeviceError>(__FILE__, __LINE__, "the NVIDIA driver has no ", name,
                                "; install driver 580 or newer");
    }
    function = reinterpret_cast<Function>(found);
  }
};

void check_driver(CUresult status, const char* call) {
  if (status == CUDA_SUCCESS) return;
  detail::fail<DeviceError>(__FILE__, __LINE__, call, " failed: CUresult ", int(status));
}

/// What device memory and pinned host memory of one device have in common.
class CudaStreams : public Upstream {
 public:
  explicit CudaStreams(int device) : device_(device) {
    int count = 0;
    FASTGPT_CUDA_TRY(cudaGetDeviceCount(&count));
    FASTGPT_CHECK(device >= 0 && device < count, "device is cuda:", device, "; this machine has ",
                  count, " CUDA devices");
  }

  int device() const override { return device_; }
  bool is_synchronous(void*) const override { return false; }

  void* create_stream() override {
    const CurrentDevice current(device_);
    CaptureGuard capture;
    cudaStream_t stream = nullptr;
    FASTGPT_CUDA_TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
  void destroy_stream(void* stream) noexcept override {
    (void)cudaStreamDestroy(static_cast<cudaStream_t>(stream));
    (void)cudaGetLastError();
  }

  Event create_event() override {
    const CurrentDevice current(device_);
    CaptureGuard capture;
    cudaEvent_t event = nullptr;
    FASTGPT_CUDA_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
  }
  void destroy_event(Event event) noexcept override {
    (void)cudaEventDestroy(static_cast<cudaEvent_t>(event));
    (void)cudaGetLastError();
  }
  void record(Event event, void* stream) override {
    const CurrentDevice current(device_);
    FASTGPT_CUDA_TRY(
        cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
  }
  void wait(void* stream, Event event) override {
    const CurrentDevice current(device_);
    FASTGPT_CUDA_TRY(
        cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0));
  }
  bool query(Event event) override {
    CaptureGuard capture;
    const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (status == cudaErrorNotReady) {
      (void)cudaGetLastError();
      return false;
    }
    FASTGPT_CUDA_TRY(status);
    return true;
  }
  void synchronize(Event event) override {
    CaptureGuard capture;
    FASTGPT_CUDA_TRY(cudaEventSynchronize(static_cast<cudaEvent_t>(event)));
  }
  // At process exit the driver may be gone before the last tensor: then there is nothing to wait
  // for.
  void synchronize_device() noexcept override {
    int previous = 0;
    if (cudaGetDevice(&previous) != cudaSuccess) return;
    CaptureGuard capture;
    (void)cudaSetDevice(device_);
    (void)cudaDeviceSynchronize();
    (void)cudaSetDevice(previous);
    (void)cudaGetLastError();
  }
  bool is_capturing(void* stream) override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t result = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
    if (result == cudaErrorStreamCaptureImplicit) {  // the legacy stream, while another captures
      (void)cudaGetLastError();
      return true;
    }
    FASTGPT_CUDA_TRY(result);
    return status != cudaStreamCaptureStatusNone;
  }

  void fill_zero(void* data, std::size_t bytes, void* stream) override {
    const CurrentDevice current(device_);
    FASTGPT_CUDA_TRY(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
  }
  void copy(void* target, const void* source, std::size_t bytes, void* stream) override {
    const CurrentDevice current(device_);
    FASTGPT_CUDA_TRY(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault,
                                     static_cast<cudaStream_t>(stream)));
  }

 protected:
  const int device_;
};

class CudaUpstream final : public CudaStreams {
 public:
  explicit CudaUpstream(int device) : CudaStreams(device) {
    const CurrentDevice current(device);
    std::size_t unused = 0;
    FASTGPT_CUDA_TRY(cudaMemGetInfo(&unused, &total_bytes_));
    int supported = 0;
    check_driver(driver_.attribute(&supported,
                                   CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device),
                 "cuDeviceGetAttribute");
    can_map_ = supported != 0;
    if (!can_map_) return;
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    check_driver(driver_.granularity(&granularity_, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                 "cuMemGetAllocationGranularity");
  }

  DeviceType device_type() const override { return DeviceType::kCUDA; }

  void* reserve(std::size_t bytes) override {
    if (!can_map_) return nullptr;
    const CurrentDevice current(device_);
    CUdeviceptr address = 0;
    check_driver(driver_.reserve(&address, bytes, granularity_, 0, 0), "cuMemAddressReserve");
    return reinterpret_cast<void*>(address);
  }
  void unreserve(void* address, std::size_t bytes) noexcept override {
    (void)driver_.unreserve(reinterpret_cast<CUdeviceptr>(address), bytes);
  }

  std::size_t granularity() const override { return granularity_; }

  Handle create(std::size_t bytes) override {
    const CurrentDevice current(device_);
    CaptureGuard capture;
    CUmemGenericAllocationHandle handle = 0;
    const CUresult status = driver_.create(&handle, bytes, &properties_, 0);
    if (status == CUDA_ERROR_OUT_OF_MEMORY) return {};
    check_driver(status, "cuMemCreate");
    return {handle, bytes};
  }
  void destroy(Handle handle) noexcept override { (void)driver_.release(handle.id); }

  // One cuMemSetAccess for the whole run: it is the dear one of the three calls.
  bool map(void* address, const std::vector<Handle>& handles) override {
    const CurrentDevice current(device_);
    CaptureGuard capture;
    const auto begin = reinterpret_cast<CUdeviceptr>(address);
    CUdeviceptr at = begin;
    CUresult status = CUDA_SUCCESS;
    for (const Handle handle : handles) {
      status = driver_.map(at, handle.bytes, 0, handle.id, 0);
      if (status != CUDA_SUCCESS) break;
      at += handle.bytes;
    }
    if (status == CUDA_SUCCESS) {
      CUmemAccessDesc access{};
      access.location = properties_.location;
      access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
      status = driver_.set_access(begin, at - begin, &access, 1);
    }
    if (status == CUDA_SUCCESS) return true;
    CUdeviceptr mapped = begin;
    for (const Handle handle : handles) {
      if (mapped == at) break;
      (void)driver_.unmap(mapped, handle.bytes);
      mapped += handle.bytes;
    }
    return false;
  }
  bool unmap(void* address, Handle handle) noexcept override {
    CaptureGuard capture;
    return driver_.unmap(reinterpret_cast<CUdeviceptr>(address), handle.bytes) == CUDA_SUCCESS;
  }

  void* allocate(std::size_t bytes) override {
    const CurrentDevice current(device_);
    CaptureGuard capture;
    void* data = nullptr;
    const cudaError_t status = cudaMalloc(&data, bytes);
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      return nullptr;
    }
    FASTGPT_CUDA_TRY(status);
    return data;
  }
  void free(void* data, std::size_t) noexcept override {
    int previous = 0;
    if (cudaGetDevice(&previous) != cudaSuccess) return;
    CaptureGuard capture;
    (void)cudaSetDevice(device_);
    (void)cudaFree(data);
    (void)cudaSetDevice(previous);
    (void)cudaGetLastError();
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
  const DriverFunctions driver_;
  CUmemAllocationProp properties_{};
  std::size_t granularity_ = std::size_t{2} << 20;
  std::size_t total_bytes_ = 0;
  bool can_map_ = false;
};

/// Slabs of page-locked memory. Locking runs at 2.8 GB/s, so the arena on top keeps what it has.
class PinnedUpstream final : public CudaStreams {
 public:
  explicit PinnedUpstream(int device) : CudaStreams(device), host_(make_host_upstream()) {}

  DeviceType device_type() const override { return DeviceType::kCPU; }
  void* reserve(std::size_t) override { return nullptr; }
  void unreserve(void*, std::size_t) noexcept override {}
  std::size_t granularity() const override { return 4096; }
  Handle create(std::size_t) override { return {}; }
  void destroy(Handle) noexcept override {}
  bool map(void*, const std::vector<Handle>&) override { return false; }
  bool unmap(void*, Handle) noexcept override { return false; }

  void* allocate(std::size_t bytes) override {
    const CurrentDevice current(device_);
    CaptureGuard capture;
    void* data = nullptr;
    const cudaError_t status = cudaHostAlloc(&data, bytes, cudaHostAllocPortable);
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      return nullptr;
    }
    FASTGPT_CUDA_TRY(status);
    return data;
  }
  void free(void* data, std::size_t) noexcept override {
    (void)cudaFreeHost(data);
    (void)cudaGetLastError();
  }

  std::size_t free_bytes() const override { return host_->free_bytes(); }
  std::size_t total_bytes() const override { return host_->total_bytes(); }

 private:
  const std::shared_ptr<Upstream> host_;
};

}  // namespace

std::shared_ptr<Upstream> make_cuda_upstream(int device) {
  return std::make_shared<CudaUpstream>(device);
}

std::shared_ptr<Upstream> make_pinned_upstream(int device) {
  return std::make_shared<PinnedUpstream>(device);
}

}  // namespace fastgpt
