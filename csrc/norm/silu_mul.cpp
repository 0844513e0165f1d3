#include "fastgpt/norm.h"
#include "fastgpt/tensor_check.h"
#include "norm/kernels.h"

namespace fastgpt::norm {

void silu_mul(const SiluMulParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.x, "x", 2);
  FASTGPT_CHECK_TENSOR(p.out, "out", 2);
  check_floating(p.x, "x");
  check_same_dtype(p.out, "out", p.x, "x");
  FASTGPT_CHECK(p.x.size(1) % 2 == 0, "x has ", p.x.size(1),
                " columns; expected gate and up side by side, an even number");
  check_size(p.out, "out", 0, p.x.size(0), "the number of rows of x");
  check_size(p.out, "out", 1, p.x.size(1) / 2, "half the width of x");
  if (p.out.numel() == 0) return;
  FASTGPT_DISPATCH(stream, silu_mul, p);
}

}  // namespace fastgpt::norm
