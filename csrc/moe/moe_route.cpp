#include "fastgpt/moe.h"
#include "fastgpt/tensor_check.h"
#include "moe/kernels.h"

namespace fastgpt::moe {

void moe_route(const MoeRouteParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.logits, "logits", 2);
  check_dtype(p.logits, "logits", DType::kF32);
  const std::int64_t num_experts = p.logits.size(1);
  if (p.correction_bias) {
    check_vector(p.correction_bias, "correction_bias", DType::kF32, num_experts,
                 "the number of experts");
  }
  FASTGPT_CHECK(p.num_groups >= 1 && num_experts % p.num_groups == 0, "num_groups is ",
                p.num_groups, "; expected a divisor of the ", num_experts, " experts");
  FASTGPT_CHECK(p.topk_groups >= 1 && p.topk_groups <= p.num_groups, "topk_groups is ",
                p.topk_groups, "; expected 1 to num_groups, ", p.num_groups);
  const std::int64_t reachable = num_experts / p.num_groups * p.topk_groups;
  FASTGPT_CHECK(p.top_k >= 1 && p.top_k <= reachable, "top_k is ", p.top_k, "; expected 1 to ",
                reachable, ", the experts of topk_groups groups");
  FASTGPT_CHECK_TENSOR(p.expert_ids, "expert_ids", 2);
  FASTGPT_CHECK_TENSOR(p.weights, "weights", 2);
  check_dtype(p.expert_ids, "expert_ids", DType::kI32);
  check_dtype(p.weights, "weights", DType::kF32);
  check_size(p.expert_ids, "expert_ids", 0, p.logits.size(0), "the number of tokens");
  check_size(p.expert_ids, "expert_ids", 1, p.top_k, "top_k");
  check_size(p.weights, "weights", 0, p.logits.size(0), "the number of tokens");
  check_size(p.weights, "weights", 1, p.top_k, "top_k");
  if (p.logits.size(0) == 0) return;
  FASTGPT_DISPATCH(stream, moe_route, p);
}

}  // namespace fastgpt::moe
