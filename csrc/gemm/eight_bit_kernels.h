// What eight_bit.cpp calls.
#pragma once
#include "fastgpt/eight_bit.h"

namespace fastgpt::gemm {

void quantize_rows_cpu(const QuantizeRowsParams& params);
void linear_eight_bit_cpu(const EightBitLinearParams& params);

void quantize_rows_cuda(const QuantizeRowsParams& params, const Stream& stream);
void linear_eight_bit_cuda(const EightBitLinearParams& params, const Stream& stream);
bool has_eight_bit_product_cuda();

}  // namespace fastgpt::gemm
