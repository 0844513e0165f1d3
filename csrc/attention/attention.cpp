#include "fastgpt/attention.h"

#include "attention/batch_check.h"
#include "attention/kernels.h"
#include "fastgpt/kv_format.h"

namespace fastgpt::attention {

void attention(const AttentionParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.q, "q", 3);
  FASTGPT_CHECK_TENSOR(p.out, "out", 3);
  FASTGPT_CHECK_TENSOR(p.kv_cache, "kv_cache", 5);
  check_floating(p.q, "q");
  check_same_dtype(p.out, "out", p.q, "q");
  check_size(p.out, "out", 0, p.q.size(0), "the number of rows of q");
  check_size(p.out, "out", 1, p.q.size(1), "the number of heads of q");
  check_size(p.kv_cache, "kv_cache", 1, 2, "keys and values");
  const std::int64_t num_kv_heads = p.kv_cache.size(3);
  FASTGPT_CHECK(num_kv_heads > 0 && p.q.size(1) % num_kv_heads == 0, "q has ", p.q.size(1),
                " heads, not a multiple of the ", num_kv_heads, " heads of kv_cache");
  FASTGPT_CHECK(p.q.size(2) <= p.kv_cache.size(4) && p.out.size(2) <= p.kv_cache.size(4),
                "kv_cache has rows of ", p.kv_cache.size(4), " elements; q has head size ",
                p.q.size(2), " and out ", p.out.size(2));
  FASTGPT_CHECK(p.kv_cache.size(2) > 0, "kv_cache has block size 0");
  check_kv_scale(p.kv_cache, p.kv_scale);
  check_batch(p.block_tables, p.cu_seqlens_q, p.seq_lens);
  check_workspace(p.workspace);
  if (p.out.numel() == 0 || p.seq_lens.size(0) == 0) return;
  FASTGPT_DISPATCH(stream, attention, p);
}

void mla_attention(const MlaAttentionParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.q, "q", 3);
  FASTGPT_CHECK_TENSOR(p.out, "out", 3);
  FASTGPT_CHECK_TENSOR(p.kv_cache, "kv_cache", 3);
  check_floating(p.q, "q");
  check_same_dtype(p.out, "out", p.q, "q");
  check_size(p.out, "out", 0, p.q.size(0), "the number of rows of q");
  check_size(p.out, "out", 1, p.q.size(1), "the number of heads of q");
  check_latent_scale(p.kv_cache, p.kv_scale, p.pe_cache);
  if (p.pe_cache) {
    check_size(p.pe_cache, "pe_cache", 2, p.q.size(2) - p.kv_cache.size(2),
               "the head size of q without the columns of kv_cache");
  } else {
    check_size(p.kv_cache, "kv_cache", 2, p.q.size(2), "the head size of q");
  }
  FASTGPT_CHECK(p.out.size(2) <= p.q.size(2), "out has head size ", p.out.size(2),
                "; expected at most that of q, ", p.q.size(2));
  FASTGPT_CHECK(p.kv_cache.size(1) > 0, "kv_cache has block size 0");
  check_batch(p.block_tables, p.cu_seqlens_q, p.seq_lens);
  check_workspace(p.workspace);
  if (p.out.numel() == 0 || p.seq_lens.size(0) == 0) return;
  FASTGPT_DISPATCH(stream, mla_attention, p);
}

std::int64_t attention_workspace_bytes(std::int64_t num_tokens, std::int64_t num_heads,
                                       std::int64_t head_dim_v, std::int64_t max_seq_len,
                                       DeviceType device_type) {
  FASTGPT_CHECK(num_tokens >= 0 && num_heads >= 0 && head_dim_v >= 0 && max_seq_len >= 0,
                "workspace asked for ", num_tokens, " tokens, ", num_heads, " heads, head size ",
                head_dim_v, ", sequences of ", max_seq_len, "; expected 0 or more");
  if (device_type == DeviceType::kCPU) return 0;
#ifdef FASTGPT_WITH_CUDA
  return attention_workspace_bytes_cuda(num_tokens, num_heads, head_dim_v, max_seq_len);
#else
  detail::fail<DeviceError>(__FILE__, __LINE__,
                            "attention_workspace_bytes: this build has no CUDA kernels; rebuild "
                            "with nvcc and FASTGPT_CUDA=1");
#endif
}

}  // namespace fastgpt::attention
