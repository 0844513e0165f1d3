// Products of eight-bit codes on both sides: rows of x are quantized as they come, one scale a row
// or one a row and 128 columns, and the product runs on eight-bit units.
//
// A row (or its group) with scale s stands for code * s, s = amax / 448 (e4m3) or amax / 127 (int8)
// and at least 2^-100; codes are rounded to nearest even. A row (group) that holds NaN or infinity
// gets scale NaN and codes 0: everything it adds to is NaN.
#pragma once
#include <cstdint>

#include "fastgpt/device.h"
#include "fastgpt/gemm.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::gemm {

inline constexpr std::int64_t kRowGroup = 128;      // columns that share a scale, where not all do
inline constexpr std::int64_t kRowScaleStride = 4;  // rows of scales are padded to this many

/// Sizes of what quantize_rows writes.
constexpr std::int64_t row_codes_width(std::int64_t k) {
  return (k + kRowGroup - 1) / kRowGroup * kRowGroup;
}
constexpr std::int64_t row_scales_width(std::int64_t num_rows) {
  return (num_rows + kRowScaleStride - 1) / kRowScaleStride * kRowScaleStride;
}

struct QuantizeRowsParams {
  TensorView x;      // [num_rows, k], any float dtype, last dimension contiguous
  TensorView codes;  // uint8 (e4m3) or int8 [num_rows, row_codes_width(k)]; the order of columns
                     // within 64 is private to the backend, those behind k are 0
  TensorView scale;  // float32 [1 or k / 128 rounded up, row_scales_width(num_rows)]
};
void quantize_rows(const QuantizeRowsParams& params, const Stream& stream);

/// out = rows @ weight.T + bias: e4m3 rows with an fp8 weight, int8 rows with an int8 weight. Rows
/// have a scale per 128 columns where the weight has one per 128 x 128, else one scale each.
///
/// int8 sums are exact. e4m3 sums move to float32 every 128 columns (CUDA; Hopper alone), or are
/// those of linear over code * scale in float32 (CPU).
/// @throws InvalidArgument also where has_eight_bit_product is false on CUDA.
struct EightBitLinearParams {
  TensorView codes;
  TensorView scale;
  std::int64_t k = 0;
  WeightView weight;  // of [n, k], arranged
  TensorView bias;    // [n], any float dtype; absent = none
  TensorView out;     // [num_rows, n], any float dtype, may be a column slice
};
void linear_eight_bit(const EightBitLinearParams& params, const Stream& stream);

/// Tell whether the stream's device has units that these products gain from: wgmma on CUDA; on the
/// CPU AVX512-VNNI, for int8.
bool has_eight_bit_product(WeightFormat format, const Stream& stream);

}  // namespace fastgpt::gemm
