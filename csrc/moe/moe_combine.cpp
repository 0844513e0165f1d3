#include "fastgpt/moe.h"
#include "fastgpt/tensor_check.h"
#include "moe/kernels.h"

namespace fastgpt::moe {

void moe_combine(const MoeCombineParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.y, "y", 3);
  FASTGPT_CHECK_TENSOR(p.weights, "weights", 2);
  FASTGPT_CHECK_TENSOR(p.out, "out", 2);
  check_floating(p.y, "y");
  check_dtype(p.weights, "weights", DType::kF32);
  check_floating(p.out, "out");
  check_size(p.weights, "weights", 0, p.y.size(0), "the number of tokens");
  check_size(p.weights, "weights", 1, p.y.size(1), "the experts per token");
  check_size(p.out, "out", 0, p.y.size(0), "the number of tokens");
  check_size(p.out, "out", 1, p.y.size(2), "the width of y");
  if (p.shared) {
    FASTGPT_CHECK_TENSOR(p.shared, "shared", 2);
    check_same_dtype(p.shared, "shared", p.y, "y");
    check_size(p.shared, "shared", 0, p.y.size(0), "the number of tokens");
    check_size(p.shared, "shared", 1, p.y.size(2), "the width of y");
  }
  if (p.out.numel() == 0) return;
  FASTGPT_DISPATCH(stream, moe_combine, p);
}

}  // namespace fastgpt::moe
