#include "fastgpt/norm.h"
#include "kv_cache/kernels.h"
#include "kv_cache/row_copy.h"

namespace fastgpt::kv_cache {

// Two passes over rows that stay in the cache of a core: nothing to gain from joining them here.
void rotary_write_kv_cpu(const RotaryWriteKvParams& p) {
  check_slots(p.slot_mapping, p.kv_cache.size(0) * p.kv_cache.size(2));  // before q and k change
  norm::rotary({p.positions, p.cos_sin, p.q, p.k, p.interleaved}, Stream{});
  write_kv_cpu({p.k, p.v, p.slot_mapping, p.kv_cache, p.kv_scale});
}

}  // namespace fastgpt::kv_cache
