#include <algorithm>

#include "attention/cuda_kernels.h"
#include "attention/kernels.h"
#include "device/arch.cuh"
#include "device/launch.cuh"
#include "device/pack.cuh"
#include "fastgpt/check.h"
#include "fastgpt/kv_format.h"

namespace fastgpt::attention {
namespace {

constexpr int kGqaCtas = 2;            // CTAs of a multiprocessor that a plan counts on
constexpr int kMlaCtas = 2;            // 82 KiB each
constexpr int kMlaWgmmaRows = 64;      // of a CTA that has a multiprocessor to itself
constexpr std::int64_t kMaxWaves = 4;  // more splits than this only feed combine_splits
constexpr std::int64_t kMinKeys = 64;  // per split of the longest sequence
constexpr int kRowsPerCta = 16;
static_assert(kMinKeys % kSplitKeys == 0);

// Costs in the time of a key, which fit an H100's times.
constexpr std::int64_t kSetupKeys = 128;       // of starting and ending a CTA
constexpr std::int64_t kClusterKeys = 30;      // of meeting in a cluster
constexpr std::int64_t kCombineKeys = 85;      // of a second kernel
constexpr std::int64_t kCombineSplitKeys = 2;  // of one more split in it

// Splits that take the least time for `ctas` CTAs per split, of which `slots` run at once. Where
// they are more than the multiprocessors, memory is what they share.
std::int64_t choose_num_splits(std::int64_t ctas, std::int64_t slots, std::int64_t num_sms,
                               bool has_clusters, std::int64_t max_seq_len) {
  const std::int64_t limit = std::min((max_seq_len + kMinKeys - 1) / kMinKeys,
                                      kMaxWaves * slots / std::max<std::int64_t>(ctas, 1));
  std::int64_t best = 1;
  std::int64_t best_cost = 0;
  for (std::int64_t s = 1; s <= std::max<std::int64_t>(limit, 1); ++s) {
    const std::int64_t waves = (ctas * s + slots - 1) / slots;
    const std::int64_t active = std::min(ctas * s, slots);
    std::int64_t keys = (max_seq_len + s * kSplitKeys - 1) / (s * kSplitKeys) * kSplitKeys;
    if (active > num_sms) keys = keys * active * 10 / (num_sms * 9);
    std::int64_t cost = waves * (keys + kSetupKeys);
    if (has_clusters && s > 1 && s <= kMaxClusterSplits) {
      cost += kClusterKeys;
    } else if (s > 1) {
      cost += kCombineKeys + kCombineSplitKeys * s;
    }
    if (s == 1 || cost < best_cost) {
      best = s;
      best_cost = cost;
    }
  }
  return best;
}

// Split the keys of decoded requests as far as the workspace reaches.
void plan_splits(PagedArgs& args, const TensorView& workspace, std::int64_t ctas, int ctas_per_sm,
                 bool has_clusters, std::int64_t max_seq_len, const Stream& stream) {
  args.num_splits = 1;
  args.is_cluster = false;
  args.tokens_per_req = std::min(args.max_seqlen_q, kMaxDecodeTokens);
  if (!workspace) return;
  FASTGPT_CHECK(reinterpret_cast<std::uintptr_t>(workspace.data) % 16 == 0,
                "workspace is not aligned to 16 bytes");
  const std::int64_t rows =
      std::int64_t(args.num_reqs) * args.tokens_per_req * std::int64_t(args.num_heads);
  const std::int64_t row_bytes = (std::int64_t(args.head_dim_v) + 1) * 4;
  const std::int64_t num_sms = device::num_multiprocessors(stream.device);
  const std::int64_t splits =
      std::min(choose_num_splits(ctas, num_sms * ctas_per_sm, num_sms, has_clusters, max_seq_len),
               workspace.size(0) / (rows * row_bytes));
  if (splits < 2) return;
  args.num_splits = int(splits);
  args.is_cluster = has_clusters && splits <= kMaxClusterSplits;
  args.partial = workspace.as<float>();
  args.partial_lse = args.partial + splits * rows * args.head_dim_v;
}

// What both operations fill in the same way.
template <class Params>
PagedArgs common_args(const Params& p) {
  PagedArgs args{};
  args.q = p.q.data;
  args.q_token_stride = p.q.stride(0);
  args.q_head_stride = p.q.stride(1);
  args.kv = p.kv_cache.data;
  args.num_blocks = p.kv_cache.size(0);
  args.block_stride = p.kv_cache.stride(0);
  args.block_tables = p.block_tables.template as<int>();
  args.table_stride = p.block_tables.stride(0);
  args.cu_seqlens_q = p.cu_seqlens_q.template as<int>();
  args.seq_lens = p.seq_lens.template as<int>();
  args.out = p.out.data;
  args.out_token_stride = p.out.stride(0);
  args.out_head_stride = p.out.stride(1);
  args.num_reqs = int(p.seq_lens.size(0));
  args.num_tokens = int(p.q.size(0));
  args.num_heads = int(p.q.size(1));
  args.head_dim_qk = int(p.q.size(2));
  args.head_dim_v = int(p.out.size(2));
  FASTGPT_CHECK(p.max_seqlen_q >= 1 && p.max_seq_len >= 0, "max_seqlen_q is ", p.max_seqlen_q,
                " and max_seq_len ", p.max_seq_len, "; expected at least 1 and 0");
  FASTGPT_CHECK(args.num_reqs <= 65535, "the batch has ", args.num_reqs,
                " requests; expected at most 65535");
  // A query longer than the batch cannot be, and the bound keeps row counts in 32 bits.
  args.max_seqlen_q = int(std::min<std::int64_t>(p.max_seqlen_q, args.num_tokens));
  FASTGPT_CHECK(std::int64_t(args.max_seqlen_q) * args.num_heads < (std::int64_t(1) << 31),
                "max_seqlen_q is ", args.max_seqlen_q, " with ", args.num_heads,
                " heads; split the prefill into chunks");
  args.scale = p.scale;
  args.kv_scale = p.kv_scale.template as<float>();
  args.scale_block_stride = p.kv_scale.stride(0);
  return args;
}

bool fits_tensor_cores(const TensorView& q, const TensorView& kv_cache, const TensorView& out,
                       const Stream& stream) {
  const bool has_codes = is_code(kv_cache.dtype);  // 16 of them make one copy
  return (has_codes || q.dtype == kv_cache.dtype) && has_tensor_cores(q.dtype, stream) &&
         device::rows_aligned(q, 8) && device::rows_aligned(kv_cache, has_codes ? 16 : 8) &&
         device::rows_aligned(out, 8) && (!has_codes || q.size(2) % 16 == 0);
}

}  // namespace

void attention_cuda(const AttentionParams& p, const Stream& stream) {
  PagedArgs args = common_args(p);
  args.value_offset = p.kv_cache.stride(1);
  args.slot_stride = p.kv_cache.stride(2);
  args.kv_head_stride = p.kv_cache.stride(3);
  args.block_size = int(p.kv_cache.size(2));
  args.num_kv_heads = int(p.kv_cache.size(3));
  args.group = args.num_heads / args.num_kv_heads;
  const bool has_codes = is_code(p.kv_cache.dtype);
  if (has_codes) {
    args.scale_value_offset = p.kv_scale.stride(1);
    args.scale_head_stride = p.kv_scale.stride(2);
    args.scale_slot_stride = 1;
  }
  const bool is_known = args.head_dim_qk <= 256 && args.head_dim_v <= args.head_dim_qk;
  if (!is_known || !fits_tensor_cores(p.q, p.kv_cache, p.out, stream)) {
    return launch_fma(args, p.q.dtype, p.kv_cache.dtype, stream);
  }
  if (args.max_seqlen_q > kMaxDecodeTokens) {
    // One request needs no second launch for the short ones.
    args.min_q_len = args.num_reqs == 1 ? 0 : kMaxDecodeTokens + 1;
    if (!has_codes && has_wgmma_prefill(args)) {
      launch_prefill_wgmma(args, p.q.dtype, stream);
    } else {
      launch_prefill(args, p.q.dtype, p.kv_cache.dtype, stream);
    }
    if (args.num_reqs == 1) return;
  }
  const std::int64_t tokens = std::min(args.max_seqlen_q, kMaxDecodeTokens);
  const std::int64_t row_tiles = (tokens * args.group + kRowsPerCta - 1) / kRowsPerCta;
  plan_splits(args, p.workspace, row_tiles * args.num_kv_heads * args.num_reqs, kGqaCtas,
              device::current_traits().arch >= 90, p.max_seq_len, stream);
  launch_decode(args, p.q.dtype, p.kv_cache.dtype, stream);
  if (args.num_splits > 1 && !args.is_cluster) launch_combine(args, p.q.dtype, stream);
}

void mla_attention_cuda(const MlaAttentionParams& p, const Stream& stream) {
  PagedArgs args = common_args(p);
  args.slot_stride = p.kv_cache.stride(1);
  args.block_size = int(p.kv_cache.size(1));
  args.num_kv_heads = 1;
  args.group = args.num_heads;
  const bool has_codes = is_code(p.kv_cache.dtype);
  bool is_known = args.head_dim_qk == 576 && args.head_dim_v == 512;
  if (has_codes) {
    args.latent = int(p.kv_cache.size(2));
    args.scale_slot_stride = p.kv_scale.stride(1);
    args.pe = p.pe_cache.data;
    args.pe_dtype = p.pe_cache.dtype;
    args.pe_block_stride = p.pe_cache.stride(0);
    args.pe_slot_stride = p.pe_cache.stride(1);
    is_known = is_known && args.latent == args.head_dim_v && p.pe_cache.dtype == p.q.dtype &&
               device::rows_aligned(p.pe_cache, 8) && device::rows_aligned(p.kv_scale, 4);
  }
  if (!is_known || !fits_tensor_cores(p.q, p.kv_cache, p.out, stream)) {
    return launch_fma(args, p.q.dtype, p.kv_cache.dtype, stream);
  }
  const std::int64_t tokens = std::min(args.max_seqlen_q, kMaxDecodeTokens);
  // From a quarter of its rows on, the 64-row CTA is the faster one.
  const bool by_wgmma =
      !has_codes && args.max_seqlen_q * args.num_heads >= kMlaWgmmaRows / 4 && has_wgmma_mla(args);
  const std::int64_t cta_rows = by_wgmma ? kMlaWgmmaRows : kRowsPerCta;
  const std::int64_t row_tiles = (tokens * args.num_heads + cta_rows - 1) / cta_rows;
  plan_splits(args, p.workspace, row_tiles * args.num_reqs, by_wgmma ? 1 : kMlaCtas, false,
              p.max_seq_len, stream);
  if (by_wgmma) {
    launch_mla_wgmma(args, p.q.dtype, stream);
  } else {
    launch_mla(args, p.q.dtype, p.kv_cache.dtype, stream);
  }
  if (args.num_splits > 1) launch_combine(args, p.q.dtype, stream);
}

std::int64_t attention_workspace_bytes_cuda(std::int64_t num_tokens, std::int64_t num_heads,
                                            std::int64_t head_dim_v, std::int64_t max_seq_len) {
  int device = 0;
  FASTGPT_CUDA_TRY(cudaGetDevice(&device));
  // A CTA serves at most 16 rows and choose_num_splits asks for at most kMaxWaves waves of them.
  const std::int64_t max_rows =
      kMaxWaves * device::num_multiprocessors(device) * kGqaCtas * kRowsPerCta;
  const std::int64_t max_splits = (max_seq_len + kMinKeys - 1) / kMinKeys;
  const std::int64_t rows = std::min(num_tokens * num_heads * max_splits, max_rows);
  return rows * (head_dim_v + 1) * 4;
}

}  // namespace fastgpt::attention
