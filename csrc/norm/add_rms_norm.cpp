#include "fastgpt/norm.h"
#include "fastgpt/tensor_check.h"
#include "norm/kernels.h"

namespace fastgpt::norm {

void add_rms_norm(const AddRmsNormParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.x, "x", 2);
  FASTGPT_CHECK_TENSOR(p.residual, "residual", 2);
  FASTGPT_CHECK_TENSOR(p.out, "out", 2);
  check_floating(p.x, "x");
  check_floating(p.residual, "residual");
  check_same_dtype(p.out, "out", p.x, "x");
  for (int i = 0; i < 2; ++i) {
    check_size(p.residual, "residual", i, p.x.size(i), "the size of x");
    check_size(p.out, "out", i, p.x.size(i), "the size of x");
  }
  if (p.weight) {
    FASTGPT_CHECK_TENSOR(p.weight, "weight", 1);
    check_floating(p.weight, "weight");
    check_size(p.weight, "weight", 0, p.x.size(1), "the width of x");
  }
  FASTGPT_CHECK(p.eps >= 0.0F, "eps is ", p.eps, "; expected 0 or more");
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, add_rms_norm, p);
}

}  // namespace fastgpt::norm
