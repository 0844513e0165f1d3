#include "bindings/stable.h"
#include "fastgpt/attention.h"

namespace fastgpt::bindings {
namespace {

void attention(const Tensor& q, const Tensor& kv_cache, const Tensor& block_tables,
               const Tensor& cu_seqlens_q, const Tensor& seq_lens, double scale,
               std::int64_t max_seqlen_q, std::int64_t max_seq_len, const Tensor& out,
               const std::optional<Tensor>& workspace) {
  guarded([&] {
    check_same_device(q, {&kv_cache, &block_tables, &cu_seqlens_q, &seq_lens, &out,
                          workspace ? &*workspace : nullptr});
    attention::attention(
        {view(q), view(kv_cache), view(block_tables), view(cu_seqlens_q), view(seq_lens), view(out),
         view(workspace), float(scale), max_seqlen_q, max_seq_len},
        stream_of(q));
  });
}

void mla_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& block_tables,
                   const Tensor& cu_seqlens_q, const Tensor& seq_lens, double scale,
                   std::int64_t max_seqlen_q, std::int64_t max_seq_len, const Tensor& out,
                   const std::optional<Tensor>& workspace) {
  guarded([&] {
    check_same_device(q, {&kv_cache, &block_tables, &cu_seqlens_q, &seq_lens, &out,
                          workspace ? &*workspace : nullptr});
    attention::mla_attention(
        {view(q), view(kv_cache), view(block_tables), view(cu_seqlens_q), view(seq_lens), view(out),
         view(workspace), float(scale), max_seqlen_q, max_seq_len},
        stream_of(q));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) {
  m.def(
      "attention(Tensor q, Tensor kv_cache, Tensor block_tables, Tensor cu_seqlens_q, "
      "Tensor seq_lens, float scale, int max_seqlen_q, int max_seq_len, Tensor(a!) out, "
      "Tensor(b!)? workspace) -> ()");
  m.def(
      "mla_attention(Tensor q, Tensor kv_cache, Tensor block_tables, Tensor cu_seqlens_q, "
      "Tensor seq_lens, float scale, int max_seqlen_q, int max_seq_len, Tensor(a!) out, "
      "Tensor(b!)? workspace) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("mla_attention", TORCH_BOX(&mla_attention));
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("mla_attention", TORCH_BOX(&mla_attention));
}

}  // namespace fastgpt::bindings
