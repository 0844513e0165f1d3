// Causal attention of ragged queries over the paged KV cache: prefill chunks and decodes mixed.
#pragma once
#include "fastgpt/device.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::attention {

/// Query t of request r stands at position seq_lens[r] - q_len[r] + t and attends to every
/// earlier position and its own. Keys and values are read from the cache alone.
///
///     out = softmax(scale * q k^T) v
///
/// A cache of codes (kv_format.h) is read as the numbers its codes and scales stand for.
/// Rows of a request with seq_len 0 become zero. Rows past cu_seqlens_q[num_reqs] are not touched.
/// Source: PagedAttention, arXiv:2309.06180; FlashAttention-2, arXiv:2307.08691.
struct AttentionParams {
  TensorView q;             // [num_tokens, num_heads, head_dim_qk]
  TensorView kv_cache;      // [num_blocks, 2, block_size, num_kv_heads, max(head_dim)], strided
  TensorView block_tables;  // int32 [num_reqs, max_blocks]
  TensorView cu_seqlens_q;  // int32 [num_reqs + 1]
  TensorView seq_lens;      // int32 [num_reqs], keys of each request, new tokens included
  TensorView out;           // [num_tokens, num_heads, head_dim_v]
  TensorView workspace;     // uint8 [>= attention_workspace_bytes(...)]; absent = one split
  TensorView kv_scale;      // of codes: float32 [num_blocks, 2, num_kv_heads, block_size], strided
  float scale;
  std::int64_t max_seqlen_q;  // at least the longest query; fixes the grid of a captured launch
  std::int64_t max_seq_len;   // at least the longest sequence
};
void attention(const AttentionParams& params, const Stream& stream);

/// Multi-head latent attention in absorbed form: every head shares one key row of width 576 whose
/// first 512 columns are also the value. Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
struct MlaAttentionParams {
  TensorView q;             // [num_tokens, num_heads, 576]
  TensorView kv_cache;      // [num_blocks, block_size, 576], strided; codes: 512 columns
  TensorView block_tables;  // int32 [num_reqs, max_blocks]
  TensorView cu_seqlens_q;  // int32 [num_reqs + 1]
  TensorView seq_lens;      // int32 [num_reqs]
  TensorView out;           // [num_tokens, num_heads, 512]
  TensorView workspace;     // uint8; absent = one split
  TensorView kv_scale;      // of codes: float32 [num_blocks, block_size, 4], strided
  TensorView pe_cache;      // beside codes: [num_blocks, block_size, 64], floating, strided
  float scale;
  std::int64_t max_seqlen_q;
  std::int64_t max_seq_len;
};
void mla_attention(const MlaAttentionParams& params, const Stream& stream);

/// Upper bound of the workspace for any batch within these limits; 0 on the CPU.
std::int64_t attention_workspace_bytes(std::int64_t num_tokens, std::int64_t num_heads,
                                       std::int64_t head_dim_v, std::int64_t max_seq_len,
                                       DeviceType device_type);

}  // namespace fastgpt::attention
