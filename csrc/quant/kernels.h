// What the dispatch files of this family call.
#pragma once
#include "fastgpt/quant.h"

namespace fastgpt::quant {

inline constexpr int kMaxGptqCols = 128;
inline constexpr int kBlock = 128;  // rows and columns of an fp8 block; values of a binary group

void quantize_fp8_cpu(const Fp8Params& params);
void dequantize_fp8_cpu(const Fp8Params& params);
void quantize_int8_cpu(const Int8Params& params);
void dequantize_int8_cpu(const Int8Params& params);
void quantize_int4_cpu(const Int4Params& params);
void dequantize_int4_cpu(const Int4Params& params);
void quantize_binary_cpu(const BinaryParams& params);
void dequantize_binary_cpu(const BinaryParams& params);
void gptq_round_cpu(const GptqParams& params);

void quantize_fp8_cuda(const Fp8Params& params, const Stream& stream);
void dequantize_fp8_cuda(const Fp8Params& params, const Stream& stream);
void quantize_int8_cuda(const Int8Params& params, const Stream& stream);
void dequantize_int8_cuda(const Int8Params& params, const Stream& stream);
void quantize_int4_cuda(const Int4Params& params, const Stream& stream);
void dequantize_int4_cuda(const Int4Params& params, const Stream& stream);
void quantize_binary_cuda(const BinaryParams& params, const Stream& stream);
void dequantize_binary_cuda(const BinaryParams& params, const Stream& stream);
void gptq_round_cuda(const GptqParams& params, const Stream& stream);

}  // namespace fastgpt::quant
