// Where an operation runs.
#pragma once
#include "fastgpt/check.h"

namespace fastgpt {

enum class DeviceType { kCPU, kCUDA };

/// An execution queue of one device. For the CPU the handle is null and work is done on return.
struct Stream {
  DeviceType device_type = DeviceType::kCPU;
  int device = 0;
  void* handle = nullptr;  // cudaStream_t
};

#ifdef FASTGPT_WITH_CUDA
/// Makes a CUDA device current for a scope: an op runs where its tensors are, whatever device the
/// caller's thread has current. Throws DeviceError.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = -1;  // -1: nothing to restore
};
#endif

}  // namespace fastgpt

// FASTGPT_DISPATCH(stream, op, params): run op##_cpu(params) or op##_cuda(params, stream).
#ifdef FASTGPT_WITH_CUDA
#define FASTGPT_DISPATCH(stream, op, params)                    \
  do {                                                          \
    if ((stream).device_type == ::fastgpt::DeviceType::kCUDA) { \
      const ::fastgpt::CurrentDevice current((stream).device);  \
      op##_cuda(params, stream);                                \
    } else {                                                    \
      op##_cpu(params);                                         \
    }                                                           \
  } while (0)
#else
#define FASTGPT_DISPATCH(stream, op, params)                         \
  do {                                                               \
    if ((stream).device_type == ::fastgpt::DeviceType::kCUDA) {      \
      ::fastgpt::detail::fail<::fastgpt::DeviceError>(               \
          __FILE__, __LINE__, #op,                                   \
          ": this build has no CUDA kernels; rebuild with nvcc and " \
          "FASTGPT_CUDA=1");                                         \
    }                                                                \
    op##_cpu(params);                                                \
  } while (0)
#endif
