// What the CUDA files of this family share on the host: one argument struct, one launcher each.
#pragma once
#include <cstdint>

#include "fastgpt/device.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::attention {

/// Requests with at most this many new tokens are decoded: their keys are split over CTAs.
/// Longer ones have enough query tiles to fill the device.
constexpr int kMaxDecodeTokens = 8;

/// Splits that a cluster merges.
constexpr int kMaxClusterSplits = 8;

/// A split starts at a multiple of this many keys.
constexpr int kSplitKeys = 64;

/// Strides count elements. For MLA, kv is the latent row: keys are its 576 columns, values its
/// first 512, and every head shares it (num_kv_heads 1). The last fields are of codes alone
/// (kv_format.h); those of pe of latent codes.
struct PagedArgs {
  const void* q;
  std::int64_t q_token_stride;
  std::int64_t q_head_stride;
  const void* kv;
  std::int64_t num_blocks;
  std::int64_t block_stride;
  std::int64_t value_offset;  // from a key row to its value row
  std::int64_t slot_stride;
  std::int64_t kv_head_stride;
  const int* block_tables;
  std::int64_t table_stride;
  const int* cu_seqlens_q;
  const int* seq_lens;
  void* out;
  std::int64_t out_token_stride;
  std::int64_t out_head_stride;
  float* partial;      // [num_splits, num_rows, head_dim_v]; unused with one split or a cluster
  float* partial_lse;  // [num_splits, num_rows], natural logarithm
  int num_splits;
  bool is_cluster;  // splits are the CTAs of one cluster and merge in its shared memory
  int num_reqs;
  int num_tokens;
  int tokens_per_req;  // rows of partial: (req * tokens_per_req + token) * num_heads + head
  int block_size;
  int num_heads;
  int num_kv_heads;
  int group;  // query heads per key head
  int head_dim_qk;
  int head_dim_v;
  int max_seqlen_q;
  int min_q_len;  // requests with fewer new tokens belong to another launch
  float scale;

  const float* kv_scale;
  std::int64_t scale_block_stride;
  std::int64_t scale_value_offset;  // from a key's scale to its value's
  std::int64_t scale_slot_stride;
  std::int64_t scale_head_stride;
  const void* pe;
  DType pe_dtype;
  std::int64_t pe_block_stride;
  std::int64_t pe_slot_stride;
  int latent;  // columns of latent codes; 0: keys and values per head
};

/// cache_dtype: the queries' dtype, or codes.
void launch_prefill(const PagedArgs& args, DType dtype, DType cache_dtype, const Stream& stream);
void launch_decode(const PagedArgs& args, DType dtype, DType cache_dtype, const Stream& stream);
void launch_mla(const PagedArgs& args, DType dtype, DType cache_dtype, const Stream& stream);

/// The same by Hopper's warp-group products and bulk copies, where has_wgmma_prefill and _mla: the
/// loaded code is sm_90a's, and a block of the cache can be cut into boxes for the copy engine.
bool has_wgmma_prefill(const PagedArgs& args);
bool has_wgmma_mla(const PagedArgs& args);
void launch_prefill_wgmma(const PagedArgs& args, DType dtype, const Stream& stream);
void launch_mla_wgmma(const PagedArgs& args, DType dtype, const Stream& stream);

void launch_combine(const PagedArgs& args, DType dtype, const Stream& stream);

/// Any dtypes and alignment, by plain multiplications: float32, and what tensor cores cannot.
void launch_fma(const PagedArgs& args, DType dtype, DType cache_dtype, const Stream& stream);

/// True if the code that runs on this device multiplies this dtype on tensor cores.
bool has_tensor_cores(DType dtype, const Stream& stream);

}  // namespace fastgpt::attention
