#include <algorithm>
#include <vector>

#include "fastgpt/check.h"
#include "moe/kernels.h"

namespace fastgpt::moe {

// One thread: n * top_k is a few thousand at most and both passes are bound by latency.
void moe_sort_cpu(const MoeSortParams& p) {
  const std::int32_t* ids = p.expert_ids.as<std::int32_t>();
  const std::int64_t num_rows = p.expert_ids.numel();
  const std::int64_t num_experts = p.offsets.size(0) - 1;
  std::int32_t* offsets = p.offsets.as<std::int32_t>();
  std::fill_n(offsets, num_experts + 1, 0);
  for (std::int64_t i = 0; i < num_rows; ++i) {
    FASTGPT_CHECK(ids[i] >= 0 && ids[i] < num_experts, "expert_ids holds ", ids[i],
                  " at flat index ", i, "; there are ", num_experts, " experts");
    ++offsets[ids[i] + 1];
  }
  for (std::int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];
  std::vector<std::int32_t> next(offsets, offsets + num_experts);
  for (std::int64_t i = 0; i < num_rows; ++i) {
    p.sorted_rows.as<std::int32_t>()[next[std::size_t(ids[i])]++] = std::int32_t(i);
  }
}

}  // namespace fastgpt::moe
