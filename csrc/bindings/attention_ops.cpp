#include "bindings/stable.h"
#include "fastgpt/attention.h"

namespace fastgpt::bindings {
namespace {

void attention(const Tensor& q, const Tensor& kv_cache, const Tensor& block_tables,
               const Tensor& cu_seqlens_q, const Tensor& seq_lens, double scale,
               std::int64_t max_seqlen_q, std::int64_t max_seq_len, const Tensor& out,
               const std::optional<Tensor>& workspace, const std::optional<Tensor>& kv_scale) {
  guarded([&] {
    check_same_device(q, {&kv_cache, &block_tables, &cu_seqlens_q, &seq_lens, &out,
                          pointer(workspace), pointer(kv_scale)});
    attention::attention(
        {view(q), view(kv_cache), view(block_tables), view(cu_seqlens_q), view(seq_lens), view(out),
         view(workspace), view(kv_scale), float(scale), max_seqlen_q, max_seq_len},
        stream_of(q));
  });
}

void mla_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& block_tables,
                   const Tensor& cu_seqlens_q, const Tensor& seq_lens, double scale,
                   std::int64_t max_seqlen_q, std::int64_t max_seq_len, const Tensor& out,
                   const std::optional<Tensor>& workspace, const std::optional<Tensor>& kv_scale,
                   const std::optional<Tensor>& pe_cache) {
  guarded([&] {
    check_same_device(q, {&kv_cache, &block_tables, &cu_seqlens_q, &seq_lens, &out,
                          pointer(workspace), pointer(kv_scale), pointer(pe_cache)});
    attention::mla_attention(
        {view(q), view(kv_cache), view(block_tables), view(cu_seqlens_q), view(seq_lens), view(out),
         view(workspace), view(kv_scale), view(pe_cache), float(scale), max_seqlen_q, max_seq_len},
        stream_of(q));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) {
  m.def(
      "attention(Tensor q, Tensor kv_cache, Tensor block_tables, Tensor cu_seqlens_q, "
      "Tensor seq_lens, float scale, int max_seqlen_q, int max_seq_len, Tensor(a!) out, "
      "Tensor(b!)? workspace, Tensor? kv_scale=None) -> ()");
  m.def(
      "mla_attention(Tensor q, Tensor kv_cache, Tensor block_tables, Tensor cu_seqlens_q, "
      "Tensor seq_lens, float scale, int max_seqlen_q, int max_seq_len, Tensor(a!) out, "
      "Tensor(b!)? workspace, Tensor? kv_scale=None, Tensor? pe_cache=None) -> ()");
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
