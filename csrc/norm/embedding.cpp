#include "fastgpt/norm.h"
#include "fastgpt/tensor_check.h"
#include "norm/kernels.h"

namespace fastgpt::norm {

void embedding(const EmbeddingParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.weight, "weight", 2);
  FASTGPT_CHECK_TENSOR(p.out, "out", 2);
  check_floating(p.weight, "weight");
  check_floating(p.out, "out");
  check_vector(p.ids, "ids", DType::kI64, p.out.size(0), "the number of rows of out");
  check_size(p.out, "out", 1, p.weight.size(1), "the width of weight");
  if (p.out.numel() == 0) return;
  FASTGPT_DISPATCH(stream, embedding, p);
}

}  // namespace fastgpt::norm
