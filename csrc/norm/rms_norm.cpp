#include "fastgpt/check.h"
#include "fastgpt/norm.h"
#include "norm/kernels.h"

namespace fastgpt::norm {

void rms_norm(const RmsNormParams& p, const Stream& stream) {
  FASTGPT_CHECK(p.x.ndim == 2 || p.x.ndim == 3, "x has ", p.x.ndim,
                " dimensions; expected [num_rows, hidden] or [num_tokens, num_heads, head_dim]");
  FASTGPT_CHECK_TENSOR(p.x, "x", p.x.ndim);
  FASTGPT_CHECK_TENSOR(p.out, "out", p.x.ndim);
  FASTGPT_CHECK(is_floating(p.x.dtype), "x is ", dtype_name(p.x.dtype),
                "; expected float32, float16 or bfloat16");
  FASTGPT_CHECK(p.out.dtype == p.x.dtype, "out is ", dtype_name(p.out.dtype), ", x is ",
                dtype_name(p.x.dtype), "; expected the same dtype");
  for (int i = 0; i < p.x.ndim; ++i) {
    FASTGPT_CHECK(p.out.size(i) == p.x.size(i), "out has size ", p.out.size(i), " in dimension ", i,
                  ", x has ", p.x.size(i));
  }
  if (p.weight) {
    FASTGPT_CHECK_TENSOR(p.weight, "weight", 1);
    FASTGPT_CHECK(p.weight.size(0) == p.x.size(-1), "weight has ", p.weight.size(0),
                  " elements, rows of x have ", p.x.size(-1));
    FASTGPT_CHECK(is_floating(p.weight.dtype), "weight is ", dtype_name(p.weight.dtype),
                  "; expected float32, float16 or bfloat16");
  }
  FASTGPT_CHECK(p.eps >= 0.0F, "eps is ", p.eps, "; expected 0 or more");
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, rms_norm, p);
}

}  // namespace fastgpt::norm
