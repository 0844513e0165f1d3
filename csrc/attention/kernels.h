// What the dispatch files of this family call.
#pragma once
#include "fastgpt/attention.h"

namespace fastgpt::attention {

void attention_cpu(const AttentionParams& params);
void attention_cuda(const AttentionParams& params, const Stream& stream);

void mla_attention_cpu(const MlaAttentionParams& params);
void mla_attention_cuda(const MlaAttentionParams& params, const Stream& stream);

std::int64_t attention_workspace_bytes_cuda(std::int64_t num_tokens, std::int64_t num_heads,
                                            std::int64_t head_dim_v, std::int64_t max_seq_len);

}  // namespace fastgpt::attention
