#include "fastgpt/kv_cache.h"
#include "fastgpt/kv_format.h"
#include "kv_cache/check.h"
#include "kv_cache/kernels.h"

namespace fastgpt::kv_cache {

void check_write_kv(const WriteKvParams& p) {
  FASTGPT_CHECK_TENSOR(p.k, "k", 3);
  FASTGPT_CHECK_TENSOR(p.v, "v", 3);
  FASTGPT_CHECK_TENSOR(p.kv_cache, "kv_cache", 5);
  check_floating(p.k, "k");
  check_same_dtype(p.v, "v", p.k, "k");
  check_size(p.v, "v", 0, p.k.size(0), "the number of rows of k");
  check_size(p.v, "v", 1, p.k.size(1), "the number of heads of k");
  check_vector(p.slot_mapping, "slot_mapping", DType::kI64, p.k.size(0), "the number of rows of k");
  check_size(p.kv_cache, "kv_cache", 1, 2, "keys and values");
  check_size(p.kv_cache, "kv_cache", 3, p.k.size(1), "the number of heads of k");
  FASTGPT_CHECK(p.k.size(2) <= p.kv_cache.size(4) && p.v.size(2) <= p.kv_cache.size(4),
                "kv_cache has rows of ", p.kv_cache.size(4), " elements; k has head size ",
                p.k.size(2), " and v ", p.v.size(2));
  check_kv_scale(p.kv_cache, p.kv_scale);
}

void write_kv(const WriteKvParams& p, const Stream& stream) {
  check_write_kv(p);
  if (p.k.size(0) == 0 || p.k.size(1) == 0) return;
  FASTGPT_DISPATCH(stream, write_kv, p);
}

}  // namespace fastgpt::kv_cache
