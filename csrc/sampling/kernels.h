// What the dispatch files of this family call.
#pragma once
#include "fastgpt/sampling.h"

namespace fastgpt::sampling {

void sample_cpu(const SampleParams& params);
void sample_cuda(const SampleParams& params, const Stream& stream);

void penalize_cpu(const PenalizeParams& params);
void penalize_cuda(const PenalizeParams& params, const Stream& stream);

void record_tokens_cpu(const RecordTokensParams& params);
void record_tokens_cuda(const RecordTokensParams& params, const Stream& stream);

}  // namespace fastgpt::sampling
