// Turning a run-time dtype into a compile-time host type.
#pragma once
#include "fastgpt/check.h"
#include "fastgpt/half.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt {

/// Call fn with a value-initialized float, Half or BFloat16: `dispatch_float(dtype, [&](auto tag)
/// { using T = decltype(tag); ... })`.
template <class Fn>
void dispatch_float(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(float{});
    case DType::kF16:
      return fn(Half{});
    case DType::kBF16:
      return fn(BFloat16{});
    default:
      FASTGPT_CHECK(false, "dtype is ", dtype_name(dtype),
                    "; expected float32, float16 or bfloat16");
  }
}

}  // namespace fastgpt
