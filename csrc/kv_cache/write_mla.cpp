#include "fastgpt/kv_cache.h"
#include "fastgpt/kv_format.h"
#include "kv_cache/kernels.h"

namespace fastgpt::kv_cache {

void write_mla(const WriteMlaParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.kv_latent, "kv_latent", 2);
  FASTGPT_CHECK_TENSOR(p.k_pe, "k_pe", 2);
  FASTGPT_CHECK_TENSOR(p.kv_cache, "kv_cache", 3);
  check_floating(p.kv_latent, "kv_latent");
  check_same_dtype(p.k_pe, "k_pe", p.kv_latent, "kv_latent");
  check_latent_scale(p.kv_cache, p.kv_scale, p.pe_cache);
  check_size(p.k_pe, "k_pe", 0, p.kv_latent.size(0), "the number of rows of kv_latent");
  check_vector(p.slot_mapping, "slot_mapping", DType::kI64, p.kv_latent.size(0),
               "the number of rows of kv_latent");
  if (p.pe_cache) {
    check_size(p.kv_cache, "kv_cache", 2, p.kv_latent.size(1), "the width of kv_latent");
    check_size(p.pe_cache, "pe_cache", 2, p.k_pe.size(1), "the width of k_pe");
  } else {
    check_size(p.kv_cache, "kv_cache", 2, p.kv_latent.size(1) + p.k_pe.size(1),
               "the widths of kv_latent and k_pe together");
  }
  if (p.kv_latent.size(0) == 0) return;
  FASTGPT_DISPATCH(stream, write_mla, p);
}

}  // namespace fastgpt::kv_cache
