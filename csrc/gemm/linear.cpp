#include "fastgpt/check.h"
#include "fastgpt/dispatch.h"
#include "fastgpt/gemm.h"
#include "gemm/kernels.h"

namespace fastgpt::gemm {

void linear(const LinearParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.x, "x", 2);
  FASTGPT_CHECK_TENSOR(p.out, "out", 2);
  check_rows(p.x, p.out);
  FASTGPT_CHECK(p.out.size(0) == p.x.size(0), "out has ", p.out.size(0), " rows, x has ",
                p.x.size(0));
  const std::int64_t n = p.out.size(1);
  check_weight(p.weight, n, p.x.size(1), -1, stream.device_type);
  if (p.bias) {
    FASTGPT_CHECK_TENSOR(p.bias, "bias", 1);
    FASTGPT_CHECK(p.bias.size(0) == n, "bias has ", p.bias.size(0), " elements, out has ", n,
                  " columns");
    FASTGPT_CHECK(is_floating(p.bias.dtype), "bias is ", dtype_name(p.bias.dtype),
                  "; expected float32, float16 or bfloat16");
  }
  if (p.out.numel() == 0) return;
  FASTGPT_DISPATCH(stream, linear, p);
}

void batched_linear(const BatchedLinearParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.x, "x", 3);
  FASTGPT_CHECK_TENSOR(p.out, "out", 3);
  check_rows(p.x, p.out);
  FASTGPT_CHECK(p.out.size(0) == p.x.size(0) && p.out.size(1) == p.x.size(1), "out is [",
                p.out.size(0), ", ", p.out.size(1), ", ...], x is [", p.x.size(0), ", ",
                p.x.size(1), ", ...]; expected the same rows and heads");
  check_weight({WeightFormat::kDense, p.weight, {}, {}, 0}, p.out.size(2), p.x.size(2), p.x.size(1),
               stream.device_type);
  if (p.out.numel() == 0) return;
  FASTGPT_DISPATCH(stream, batched_linear, p);
}

void grouped_linear(const GroupedLinearParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.x, "x", 2);
  FASTGPT_CHECK_TENSOR(p.out, "out", 2);
  check_rows(p.x, p.out);
  FASTGPT_CHECK_TENSOR(p.sorted_rows, "sorted_rows", 1);
  FASTGPT_CHECK_TENSOR(p.offsets, "offsets", 1);
  FASTGPT_CHECK(p.sorted_rows.dtype == DType::kI32 && p.offsets.dtype == DType::kI32,
                "sorted_rows is ", dtype_name(p.sorted_rows.dtype), ", offsets is ",
                dtype_name(p.offsets.dtype), "; expected int32");
  FASTGPT_CHECK(p.rows_per_token >= 1, "rows_per_token is ", p.rows_per_token,
                "; expected 1 or more");
  FASTGPT_CHECK(p.sorted_rows.size(0) == p.out.size(0), "sorted_rows has ", p.sorted_rows.size(0),
                " elements, out has ", p.out.size(0), " rows");
  FASTGPT_CHECK(p.x.size(0) * p.rows_per_token == p.out.size(0), "out has ", p.out.size(0),
                " rows; expected ", p.x.size(0), " rows of x times rows_per_token ",
                p.rows_per_token);
  FASTGPT_CHECK(p.offsets.size(0) >= 1, "offsets is empty; expected num_experts + 1 elements");
  check_weight(p.weight, p.out.size(1), p.x.size(1), p.offsets.size(0) - 1, stream.device_type);
  if (p.out.numel() == 0) return;
  FASTGPT_DISPATCH(stream, grouped_linear, p);
}

}  // namespace fastgpt::gemm
