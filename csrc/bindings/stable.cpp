#include "bindings/stable.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#include "fastgpt/check.h"

namespace fastgpt::bindings {
namespace {

DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Byte:
      return DType::kU8;
    case ScalarType::Char:
      return DType::kI8;
    case ScalarType::Int:
      return DType::kI32;
    case ScalarType::Long:
      return DType::kI64;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      FASTGPT_CHECK(false, "a tensor is of type ",
                    torch::headeronly::toString(tensor.scalar_type()),
                    "; expected float32, float16, bfloat16, uint8, int8, int32, int64 or bool");
  }
  return DType::kF32;
}

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// libtorch_cuda is present only in CUDA builds of torch, so it is looked up, not linked.
CurrentStream current_cuda_stream() {
  static const CurrentStream function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return function;
}

std::string device_name(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "cpu";
}

}  // namespace

TensorView view(const Tensor& tensor) {
  TensorView v;
  v.data = tensor.data_ptr();
  v.dtype = dtype_of(tensor);
  v.ndim = int(tensor.dim());
  FASTGPT_CHECK(v.ndim <= kMaxDims, "a tensor has ", v.ndim, " dimensions; at most ", kMaxDims);
  v.defined = true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  for (int i = 0; i < v.ndim; ++i) {
    v.sizes[std::size_t(i)] = sizes[std::size_t(i)];
    v.strides[std::size_t(i)] = strides[std::size_t(i)];
  }
  return v;
}

TensorView view(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? view(*tensor) : TensorView{};
}

Stream stream_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return {};
  FASTGPT_CHECK(tensor.is_cuda(), "a tensor is on a device that is neither CPU nor CUDA");
  const int device = int(tensor.get_device_index());
  const CurrentStream get = current_cuda_stream();
  void* handle = nullptr;
  if (get == nullptr || get(device, &handle) != AOTI_TORCH_SUCCESS) {
    detail::fail<DeviceError>(__FILE__, __LINE__,
                              "torch did not name the current stream of cuda:", device);
  }
  return {DeviceType::kCUDA, device, handle};
}

void check_same_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    if (other == nullptr) continue;
    FASTGPT_CHECK(other->is_cuda() == first.is_cuda() &&
                      other->get_device_index() == first.get_device_index(),
                  "tensors are on ", device_name(first), " and ", device_name(*other),
                  "; move them to one device");
  }
}

}  // namespace fastgpt::bindings
