// From torch's stable ABI to TensorViews and Streams. Only csrc/bindings knows torch.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "fastgpt/device.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::bindings {

using torch::stable::Tensor;

/// Borrow a tensor; the view is valid while the tensor lives.
TensorView view(const Tensor& tensor);
TensorView view(const std::optional<Tensor>& tensor);  // absent -> default-constructed view

/// nullptr where a tensor is absent.
inline const Tensor* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

/// The current stream of the tensor's device.
Stream stream_of(const Tensor& tensor);

/// All given tensors (absent ones skipped) are on the device of the first, else InvalidArgument.
void check_same_device(const Tensor& first, std::initializer_list<const Tensor*> others);

/// Run body; an exception of ours leaves with its type's name in front, which fastgpt.ops reads.
template <class Body>
void guarded(Body&& body) {
  try {
    body();
  } catch (const InvalidArgument& e) {
    throw std::runtime_error(std::string("fastgpt.InvalidArgument: ") + e.what());
  } catch (const OutOfMemory& e) {
    throw std::runtime_error(std::string("fastgpt.OutOfMemory: ") + e.what());
  } catch (const DeviceError& e) {
    throw std::runtime_error(std::string("fastgpt.DeviceError: ") + e.what());
  }
}

}  // namespace fastgpt::bindings
