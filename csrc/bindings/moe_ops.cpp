#include <string>

#include "bindings/stable.h"
#include "fastgpt/moe.h"

namespace fastgpt::bindings {
namespace {

moe::Scoring scoring_of(const std::string& name) {
  FASTGPT_CHECK(name == "softmax" || name == "sigmoid", "scoring is '", name,
                "'; expected softmax or sigmoid");
  return name == "softmax" ? moe::Scoring::kSoftmax : moe::Scoring::kSigmoid;
}

void moe_route(const Tensor& logits, const std::optional<Tensor>& correction_bias,
               std::int64_t top_k, std::int64_t num_groups, std::int64_t topk_groups,
               std::string scoring, bool renormalize, double scaling, const Tensor& expert_ids,
               const Tensor& weights) {
  guarded([&] {
    check_same_device(logits,
                      {correction_bias ? &*correction_bias : nullptr, &expert_ids, &weights});
    moe::moe_route(
        {view(logits), view(correction_bias), int(top_k), int(num_groups), int(topk_groups),
         scoring_of(scoring), renormalize, float(scaling), view(expert_ids), view(weights)},
        stream_of(logits));
  });
}

void moe_sort(const Tensor& expert_ids, std::int64_t num_experts, const Tensor& sorted_rows,
              const Tensor& offsets) {
  guarded([&] {
    check_same_device(expert_ids, {&sorted_rows, &offsets});
    FASTGPT_CHECK(offsets.dim() == 1 && offsets.size(0) == num_experts + 1,
                  "offsets does not have num_experts + 1 = ", num_experts + 1, " elements");
    moe::moe_sort({view(expert_ids), view(sorted_rows), view(offsets)}, stream_of(expert_ids));
  });
}

void moe_combine(const Tensor& y, const Tensor& weights, const std::optional<Tensor>& shared,
                 const Tensor& out) {
  guarded([&] {
    check_same_device(y, {&weights, shared ? &*shared : nullptr, &out});
    moe::moe_combine({view(y), view(weights), view(shared), view(out)}, stream_of(y));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) {
  m.def(
      "moe_route(Tensor logits, Tensor? correction_bias, int top_k, int num_groups, "
      "int topk_groups, str scoring, bool renormalize, float scaling, Tensor(a!) expert_ids, "
      "Tensor(b!) weights) -> ()");
  m.def(
      "moe_sort(Tensor expert_ids, int num_experts, Tensor(a!) sorted_rows, Tensor(b!) offsets) "
      "-> ()");
  m.def("moe_combine(Tensor y, Tensor weights, Tensor? shared, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_sort", TORCH_BOX(&moe_sort));
  m.impl("moe_combine", TORCH_BOX(&moe_combine));
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_sort", TORCH_BOX(&moe_sort));
  m.impl("moe_combine", TORCH_BOX(&moe_combine));
}

}  // namespace fastgpt::bindings
