// One token's weighted sum of its experts' rows, one function per instruction set.
#pragma once
#include <cstdint>

#include "fastgpt/tensor_view.h"

namespace fastgpt::moe {

struct CombineRow {
  const void* y;  // [top_k, hidden], rows y_stride elements apart
  DType dtype;    // of y and shared
  std::int64_t y_stride, top_k, hidden;
  const float* weights;  // [top_k]
  const void* shared;    // [hidden]; null = none
  void* out;             // [hidden]
  DType out_dtype;
};

using Combine = void (*)(const CombineRow& row);
void combine_portable(const CombineRow& row);
void combine_avx2(const CombineRow& row);
void combine_avx512(const CombineRow& row);

}  // namespace fastgpt::moe
