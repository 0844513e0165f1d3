// What the dispatch files of this family call.
#pragma once
#include "fastgpt/norm.h"

namespace fastgpt::norm {

void rms_norm_cpu(const RmsNormParams& params);
void rms_norm_cuda(const RmsNormParams& params, const Stream& stream);

void add_rms_norm_cpu(const AddRmsNormParams& params);
void add_rms_norm_cuda(const AddRmsNormParams& params, const Stream& stream);

void rotary_cpu(const RotaryParams& params);
void rotary_cuda(const RotaryParams& params, const Stream& stream);

void silu_mul_cpu(const SiluMulParams& params);
void silu_mul_cuda(const SiluMulParams& params, const Stream& stream);

void embedding_cpu(const EmbeddingParams& params);
void embedding_cuda(const EmbeddingParams& params, const Stream& stream);

}  // namespace fastgpt::norm
