#include "fastgpt/moe.h"
#include "fastgpt/tensor_check.h"
#include "moe/kernels.h"

namespace fastgpt::moe {

void moe_sort(const MoeSortParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.expert_ids, "expert_ids", 2);
  check_dtype(p.expert_ids, "expert_ids", DType::kI32);
  FASTGPT_CHECK(p.expert_ids.is_contiguous(),
                "expert_ids is not contiguous; its flat index names the row");
  FASTGPT_CHECK(p.expert_ids.numel() < (std::int64_t(1) << 31), "expert_ids has ",
                p.expert_ids.numel(), " elements; expected fewer than 2^31");
  check_vector(p.sorted_rows, "sorted_rows", DType::kI32, p.expert_ids.numel(),
               "the number of expert ids");
  FASTGPT_CHECK_TENSOR(p.offsets, "offsets", 1);
  check_dtype(p.offsets, "offsets", DType::kI32);
  FASTGPT_CHECK(p.offsets.size(0) >= 1, "offsets is empty; expected num_experts + 1 elements");
  FASTGPT_DISPATCH(stream, moe_sort, p);  // an empty batch still gets its zero offsets
}

}  // namespace fastgpt::moe
