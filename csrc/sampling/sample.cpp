#include "fastgpt/sampling.h"
#include "fastgpt/tensor_check.h"
#include "sampling/kernels.h"

namespace fastgpt::sampling {

void sample(const SampleParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.logits, "logits", 2);
  check_dtype(p.logits, "logits", DType::kF32);
  const std::int64_t num_rows = p.logits.size(0);
  const char* meaning = "the number of rows of logits";
  check_vector(p.temperature, "temperature", DType::kF32, num_rows, meaning);
  check_vector(p.top_k, "top_k", DType::kI32, num_rows, meaning);
  check_vector(p.top_p, "top_p", DType::kF32, num_rows, meaning);
  check_vector(p.min_p, "min_p", DType::kF32, num_rows, meaning);
  check_vector(p.seeds, "seeds", DType::kI64, num_rows, meaning);
  check_vector(p.positions, "positions", DType::kI64, num_rows, meaning);
  check_vector(p.ids, "ids", DType::kI64, num_rows, meaning);
  if (num_rows == 0) return;
  FASTGPT_CHECK(p.logits.size(1) > 0 && p.logits.size(1) < (1 << 25), "logits has ",
                p.logits.size(1), " columns; expected 1 to 2^25 - 1");
  FASTGPT_DISPATCH(stream, sample, p);
}

}  // namespace fastgpt::sampling
