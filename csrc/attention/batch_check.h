// Checks of a ragged batch that both attention operations share.
#pragma once
#include "fastgpt/tensor_check.h"

namespace fastgpt::attention {

/// Shapes and dtypes of the tensors that describe the batch.
inline void check_batch(const TensorView& block_tables, const TensorView& cu_seqlens_q,
                        const TensorView& seq_lens) {
  FASTGPT_CHECK_TENSOR(seq_lens, "seq_lens", 1);
  check_dtype(seq_lens, "seq_lens", DType::kI32);
  FASTGPT_CHECK_TENSOR(block_tables, "block_tables", 2);
  check_dtype(block_tables, "block_tables", DType::kI32);
  check_size(block_tables, "block_tables", 0, seq_lens.size(0), "the number of requests");
  check_vector(cu_seqlens_q, "cu_seqlens_q", DType::kI32, seq_lens.size(0) + 1,
               "one more than requests");
}

/// The workspace is absent or bytes.
inline void check_workspace(const TensorView& workspace) {
  if (!workspace) return;
  FASTGPT_CHECK_TENSOR(workspace, "workspace", 1);
  check_dtype(workspace, "workspace", DType::kU8);
}

}  // namespace fastgpt::attention
