#include "fastgpt/norm.h"
#include "fastgpt/tensor_check.h"
#include "norm/kernels.h"

namespace fastgpt::norm {
namespace {

void check_heads(const TensorView& x, const char* name, std::int64_t num_tokens,
                 std::int64_t rot_dim) {
  FASTGPT_CHECK_TENSOR(x, name, 3);
  check_floating(x, name);
  check_size(x, name, 0, num_tokens, "the number of positions");
  FASTGPT_CHECK(x.size(2) >= rot_dim, name, " has head size ", x.size(2), "; cos_sin rotates ",
                rot_dim, " columns");
}

}  // namespace

void check_rotary(const RotaryParams& p) {
  FASTGPT_CHECK_TENSOR(p.cos_sin, "cos_sin", 2);
  check_dtype(p.cos_sin, "cos_sin", DType::kF32);
  const std::int64_t rot_dim = p.cos_sin.size(1);
  FASTGPT_CHECK(rot_dim % 2 == 0, "cos_sin has ", rot_dim, " columns; expected an even number");
  FASTGPT_CHECK_TENSOR(p.q, "q", 3);
  check_vector(p.positions, "positions", DType::kI64, p.q.size(0), "the number of rows of q");
  check_heads(p.q, "q", p.q.size(0), rot_dim);
  if (p.k) {
    check_heads(p.k, "k", p.q.size(0), rot_dim);
    check_same_dtype(p.k, "k", p.q, "q");
  }
}

void rotary(const RotaryParams& p, const Stream& stream) {
  check_rotary(p);
  if (p.q.size(0) == 0 || p.cos_sin.size(1) == 0) return;
  FASTGPT_DISPATCH(stream, rotary, p);
}

}  // namespace fastgpt::norm
