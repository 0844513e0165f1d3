// Checks of arguments that every operation repeats. Messages name the tensor and the expectation.
#pragma once
#include "fastgpt/check.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt {

/// float32, float16 or bfloat16.
inline void check_floating(const TensorView& view, const char* name) {
  FASTGPT_CHECK(is_floating(view.dtype), name, " is ", dtype_name(view.dtype),
                "; expected float32, float16 or bfloat16");
}

inline void check_dtype(const TensorView& view, const char* name, DType dtype) {
  FASTGPT_CHECK(view.dtype == dtype, name, " is ", dtype_name(view.dtype), "; expected ",
                dtype_name(dtype));
}

/// Both have one dtype.
inline void check_same_dtype(const TensorView& view, const char* name, const TensorView& other,
                             const char* other_name) {
  FASTGPT_CHECK(view.dtype == other.dtype, name, " is ", dtype_name(view.dtype), ", ", other_name,
                " is ", dtype_name(other.dtype), "; expected the same dtype");
}

/// Dimension `dim` of the tensor has `expected` elements; `meaning` says whose number that is.
inline void check_size(const TensorView& view, const char* name, int dim, std::int64_t expected,
                       const char* meaning) {
  FASTGPT_CHECK(view.size(dim) == expected, name, " has size ", view.size(dim), " in dimension ",
                dim, "; expected ", expected, ", ", meaning);
}

/// A vector of `expected` elements, contiguous.
inline void check_vector(const TensorView& view, const char* name, DType dtype,
                         std::int64_t expected, const char* meaning) {
  FASTGPT_CHECK_TENSOR(view, name, 1);
  check_dtype(view, name, dtype);
  check_size(view, name, 0, expected, meaning);
}

}  // namespace fastgpt
