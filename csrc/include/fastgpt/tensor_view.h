// A borrowed, typed, strided array: what every operation takes. Owns nothing.
#pragma once
#include <array>
#include <cstdint>

#include "fastgpt/check.h"

namespace fastgpt {

enum class DType : std::uint8_t { kF32, kF16, kBF16, kU8, kI8, kI32, kI64, kBool };

constexpr int dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kI64:
      return 8;
    case DType::kU8:
    case DType::kI8:
    case DType::kBool:
      return 1;
  }
  return 0;
}

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kF16:
      return "float16";
    case DType::kBF16:
      return "bfloat16";
    case DType::kU8:
      return "uint8";
    case DType::kI8:
      return "int8";
    case DType::kI32:
      return "int32";
    case DType::kI64:
      return "int64";
    case DType::kBool:
      return "bool";
  }
  return "unknown";
}

constexpr bool is_floating(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16;
}

constexpr int kMaxDims = 8;

/// Field for field the content of a DLTensor. Strides count elements, not bytes.
/// A default-constructed view is "absent": how optional arguments travel.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int ndim = 0;
  bool defined = false;
  std::array<std::int64_t, kMaxDims> sizes{};
  std::array<std::int64_t, kMaxDims> strides{};

  explicit operator bool() const { return defined; }
  std::int64_t size(int dim) const { return sizes[std::size_t(dim < 0 ? dim + ndim : dim)]; }
  std::int64_t stride(int dim) const { return strides[std::size_t(dim < 0 ? dim + ndim : dim)]; }
  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= sizes[std::size_t(i)];
    return n;
  }
  /// True if the last dimension has stride 1 (or at most one element).
  bool rows_contiguous() const { return ndim == 0 || size(-1) <= 1 || stride(-1) == 1; }
  bool is_contiguous() const {
    if (numel() == 0) return true;
    std::int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (size(i) != 1 && stride(i) != expected) return false;
      expected *= size(i);
    }
    return true;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace fastgpt

// FASTGPT_CHECK_TENSOR(view, name, ndim): present, of that rank, last dimension contiguous.
#define FASTGPT_CHECK_TENSOR(view, name, rank)                                                 \
  do {                                                                                         \
    FASTGPT_CHECK((view).defined, name, " is missing");                                        \
    FASTGPT_CHECK((view).ndim == (rank), name, " has ", (view).ndim, " dimensions; expected ", \
                  (rank));                                                                     \
    FASTGPT_CHECK((view).rows_contiguous(), name, " has stride ", (view).stride(-1),           \
                  " in its last dimension; expected 1, call .contiguous()");                   \
  } while (0)
