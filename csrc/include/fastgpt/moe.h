// Mixture of experts: which experts serve a token, and the order in which rows are computed.
#pragma once
#include "fastgpt/device.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::moe {

enum class Scoring { kSoftmax, kSigmoid };

/// Pick top_k experts per token. Experts are split into num_groups equal groups; only the best
/// topk_groups groups may serve a token. A group's score is its best expert, or with a correction
/// bias the sum of its best two. The bias steers the choice and never enters the weights.
/// Ties go to the lower id. Source: DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437.
struct MoeRouteParams {
  TensorView logits;           // float32 [num_tokens, num_experts]
  TensorView correction_bias;  // float32 [num_experts]; absent = none
  int top_k;
  int num_groups;   // 1 = no group limit
  int topk_groups;  // groups kept, <= num_groups
  Scoring scoring;
  bool renormalize;       // divide the weights by their sum
  float scaling;          // multiply the weights
  TensorView expert_ids;  // int32 [num_tokens, top_k]
  TensorView weights;     // float32 [num_tokens, top_k]
};
void moe_route(const MoeRouteParams& params, const Stream& stream);

/// Stable counting sort of the flat rows token * top_k + j by expert.
struct MoeSortParams {
  TensorView expert_ids;   // int32 [num_tokens, top_k]
  TensorView sorted_rows;  // int32 [num_tokens * top_k]
  TensorView offsets;      // int32 [num_experts + 1]
};
void moe_sort(const MoeSortParams& params, const Stream& stream);

/// out[i] = sum over j in order of weights[i, j] * y[i, j], plus shared[i], in float32.
struct MoeCombineParams {
  TensorView y;        // [num_tokens, top_k, hidden]
  TensorView weights;  // float32 [num_tokens, top_k]
  TensorView shared;   // [num_tokens, hidden]; absent = none
  TensorView out;      // [num_tokens, hidden]
};
void moe_combine(const MoeCombineParams& params, const Stream& stream);

}  // namespace fastgpt::moe
