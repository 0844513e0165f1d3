#include "fastgpt/kv_cache.h"
#include "fastgpt/norm.h"
#include "fastgpt/tensor_check.h"
#include "kv_cache/check.h"
#include "kv_cache/kernels.h"

namespace fastgpt::kv_cache {

void rotary_write_kv(const RotaryWriteKvParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.k, "k", 3);
  norm::check_rotary({p.positions, p.cos_sin, p.q, p.k, p.interleaved});
  check_write_kv({p.k, p.v, p.slot_mapping, p.kv_cache, p.kv_scale});
  if (p.q.size(0) == 0) return;
  FASTGPT_DISPATCH(stream, rotary_write_kv, p);
}

}  // namespace fastgpt::kv_cache
