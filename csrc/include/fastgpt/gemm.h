// Products with weights, d = x @ weight.T + bias, and the kernel layouts of quantized weights.
// x, out: float32, bfloat16 or float16, last dimension contiguous, rows strided; out is x's dtype
// or float32. Row i of out depends on row i of x alone and is bit-identical in any batch (CPU).
#pragma once
#include <cstdint>
#include <vector>

#include "fastgpt/device.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::gemm {

/// How a weight is stored in memory for the kernels of one backend.
enum class WeightFormat { kDense, kFp8, kInt8, kInt4 };

/// Type of a canonical weight's codes, which its arranged form keeps.
constexpr DType code_dtype(WeightFormat format) {
  return format == WeightFormat::kInt8 ? DType::kI8 : DType::kU8;
}

/// A weight after arrange(): layout private to csrc/gemm and the backend.
struct WeightView {
  WeightFormat format = WeightFormat::kDense;
  TensorView packed;      // dense: [n, k] or arranged; fp8, int4: uint8, int8: int8, arranged
  TensorView scale;       // fp8, int8: float32 [n], or fp8 per 128 x 128; int4: arranged
  TensorView zero_point;  // int4 asymmetric, arranged; else absent
  int group_size = 0;     // int4: columns that share a scale
};

struct LinearParams {
  TensorView x;       // [num_rows, k]
  WeightView weight;  // of [n, k]
  TensorView bias;    // [n], any float dtype; absent = none
  TensorView out;     // [num_rows, n], may be a column slice
};
void linear(const LinearParams& params, const Stream& stream);

/// Products with one weight of a stack per row, rows sorted by weight (see moe.h).
struct GroupedLinearParams {
  TensorView x;            // [num_rows / rows_per_token, k]
  WeightView weight;       // of [num_experts, n, k], stacked on dimension 0
  TensorView sorted_rows;  // int32 [num_rows]: position p computes out row sorted_rows[p]
  TensorView offsets;      // int32 [num_experts + 1]: expert e owns offsets[e] .. offsets[e+1]-1
  std::int64_t rows_per_token;  // out row i reads x row i / rows_per_token
  TensorView out;               // [num_rows, n]
};
void grouped_linear(const GroupedLinearParams& params, const Stream& stream);

/// out[i, h] = x[i, h] @ weight[h].T: one small product per head.
struct BatchedLinearParams {
  TensorView x;       // [num_rows, num_heads, k]
  TensorView weight;  // dense: [num_heads, m, k], or arranged with one dimension more
  TensorView out;     // [num_rows, num_heads, m]
};
void batched_linear(const BatchedLinearParams& params, const Stream& stream);

/// A canonical weight (quant.h) and where its arranged form goes. With one leading dimension more
/// on every tensor, a stack of weights.
struct ArrangeParams {
  WeightFormat format = WeightFormat::kDense;
  TensorView weight;          // [n, k]: dense, fp8 uint8, int8 int8; int4 uint8 [n, row_bytes]
  TensorView scale;           // float32 [n], or fp8 [ceil(n/128), ceil(k/128)]; int4: float16
  TensorView zero_point;      // int4 asymmetric: uint8 [n, ceil(k / group_size)]
  std::int64_t k = 0;         // in_features
  int group_size = 0;         // int4
  TensorView out_packed;      // shapes: arranged_shape()
  TensorView out_scale;       // absent for dense
  TensorView out_zero_point;  // absent without zero_point
};
/// @throws InvalidArgument if fp8 codes hold NaN (CPU).
void arrange_weight(const ArrangeParams& params, const Stream& stream);

/// Shapes of the arranged tensors of one weight; packed has the canonical dtype, scale is float16
/// for int4 and float32 else, zero_point uint8.
struct ArrangedShape {
  std::vector<std::int64_t> packed;
  std::vector<std::int64_t> scale;       // of int4; the others keep the canonical shape
  std::vector<std::int64_t> zero_point;  // of int4 asymmetric
};
ArrangedShape arranged_shape(DeviceType device_type, WeightFormat format, std::int64_t n,
                             std::int64_t k, int group_size);

}  // namespace fastgpt::gemm
