// The row functions of this family, one table per instruction set. Rows have a contiguous last
// dimension; dtypes were checked before.
#pragma once
#include <cstdint>

#include "fastgpt/tensor_view.h"

namespace fastgpt::norm {

struct Rows {
  void (*rms_norm)(const void* x, DType dtype, const void* weight, DType weight_dtype, void* out,
                   std::int64_t hidden, float eps);
  void (*add_rms_norm)(const void* x, DType dtype, void* residual, DType residual_dtype,
                       const void* weight, DType weight_dtype, void* out, std::int64_t hidden,
                       float eps);
  void (*rotate)(void* head, DType dtype, const float* cos, const float* sin, std::int64_t half,
                 bool interleaved);
  void (*silu_mul)(const void* gate, const void* up, DType dtype, void* out, std::int64_t width);
};

extern const Rows kRowsPortable;
extern const Rows kRowsAvx2;
extern const Rows kRowsAvx512;

/// The table of the instruction set in use.
const Rows& rows();

}  // namespace fastgpt::norm
