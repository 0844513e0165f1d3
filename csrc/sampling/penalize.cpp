#include "fastgpt/sampling.h"
#include "fastgpt/tensor_check.h"
#include "sampling/kernels.h"

namespace fastgpt::sampling {

void penalize(const PenalizeParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.logits, "logits", 2);
  FASTGPT_CHECK_TENSOR(p.history, "history", 2);
  check_dtype(p.logits, "logits", DType::kF32);
  check_dtype(p.history, "history", DType::kI32);
  check_size(p.history, "history", 1, p.logits.size(1), "the vocabulary of logits");
  const char* meaning = "the number of rows of logits";
  check_vector(p.slots, "slots", DType::kI64, p.logits.size(0), meaning);
  check_vector(p.repetition, "repetition", DType::kF32, p.logits.size(0), meaning);
  check_vector(p.presence, "presence", DType::kF32, p.logits.size(0), meaning);
  check_vector(p.frequency, "frequency", DType::kF32, p.logits.size(0), meaning);
  if (p.logits.numel() == 0) return;
  FASTGPT_DISPATCH(stream, penalize, p);
}

void record_tokens(const RecordTokensParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.history, "history", 2);
  check_dtype(p.history, "history", DType::kI32);
  FASTGPT_CHECK_TENSOR(p.ids, "ids", 1);
  check_dtype(p.ids, "ids", DType::kI64);
  check_vector(p.slots, "slots", DType::kI64, p.ids.size(0), "the number of ids");
  if (p.ids.size(0) == 0) return;
  FASTGPT_DISPATCH(stream, record_tokens, p);
}

}  // namespace fastgpt::sampling
