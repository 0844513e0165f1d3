#include <algorithm>
#include <atomic>
#include <vector>

#include "attention/kernels.h"
#include "attention/tile.h"
#include "fastgpt/check.h"
#include "fastgpt/isa_table.h"
#include "fastgpt/thread_pool.h"

namespace fastgpt::attention {
namespace {

// Both operations seen as one: MLA is one key/value head whose values are its keys.
struct Problem {
  TensorView q, block_tables, cu_seqlens_q, seq_lens, out, kv_cache, kv_scale, pe_cache;
  std::int64_t block_size, num_kv_heads, token_stride, head_stride, value_offset;
  float scale;
  std::int64_t max_seqlen_q, max_seq_len;
};

// Query rows first_row .. of one request and one key/value head.
struct Item {
  std::int64_t request, kv_head, first_row, num_rows;
};

void check_values(const Problem& p) {
  const std::int32_t* starts = p.cu_seqlens_q.as<std::int32_t>();
  FASTGPT_CHECK(starts[0] == 0, "cu_seqlens_q[0] is ", starts[0], "; expected 0");
  for (std::int64_t r = 0; r < p.seq_lens.size(0); ++r) {
    const std::int64_t q_len = std::int64_t(starts[r + 1]) - starts[r];
    const std::int64_t seq_len = p.seq_lens.as<std::int32_t>()[r];
    FASTGPT_CHECK(q_len >= 0 && starts[r + 1] <= p.q.size(0), "cu_seqlens_q[", r + 1, "] is ",
                  starts[r + 1], "; expected ", starts[r], " to ", p.q.size(0));
    if (q_len == 0 || seq_len == 0) continue;
    FASTGPT_CHECK(seq_len >= q_len, "seq_lens[", r, "] is ", seq_len, "; the request has ", q_len,
                  " queries, which the sequence must include");
    FASTGPT_CHECK(q_len <= p.max_seqlen_q, "request ", r, " has ", q_len,
                  " queries; max_seqlen_q is ", p.max_seqlen_q);
    FASTGPT_CHECK(seq_len <= p.max_seq_len, "seq_lens[", r, "] is ", seq_len, "; max_seq_len is ",
                  p.max_seq_len);
    const std::int64_t num_blocks = (seq_len + p.block_size - 1) / p.block_size;
    FASTGPT_CHECK(num_blocks <= p.block_tables.size(1), "seq_lens[", r, "] is ", seq_len,
                  "; block_tables holds ", p.block_tables.size(1), " blocks of ", p.block_size);
    const std::int32_t* table = p.block_tables.as<std::int32_t>() + r * p.block_tables.stride(0);
    for (std::int64_t b = 0; b < num_blocks; ++b) {
      FASTGPT_CHECK(table[b] >= 0 && table[b] < p.kv_cache.size(0), "block_tables[", r, "][", b,
                    "] is ", table[b], "; the cache has ", p.kv_cache.size(0), " blocks");
    }
  }
}

void zero_rows(const Problem& p, std::int64_t first, std::int64_t last) {
  const std::int64_t bytes = dtype_bytes(p.out.dtype);
  for (std::int64_t token = first; token < last; ++token) {
    for (std::int64_t head = 0; head < p.out.size(1); ++head) {
      char* row = p.out.as<char>() + (token * p.out.stride(0) + head * p.out.stride(1)) * bytes;
      std::fill_n(row, p.out.size(2) * bytes, char(0));
    }
  }
}

// Large tiles share reads of the cache; small ones give every thread work. The split does not
// change a result.
std::vector<Item> split(const Problem& p) {
  const std::int32_t* starts = p.cu_seqlens_q.as<std::int32_t>();
  const std::int64_t group = p.q.size(1) / p.num_kv_heads;
  const auto list = [&](std::int64_t rows_per_item) {
    std::vector<Item> items;
    for (std::int64_t r = 0; r < p.seq_lens.size(0); ++r) {
      if (p.seq_lens.as<std::int32_t>()[r] == 0) continue;
      const std::int64_t rows = (starts[r + 1] - starts[r]) * group;
      for (std::int64_t head = 0; head < p.num_kv_heads; ++head) {
        for (std::int64_t row = 0; row < rows; row += rows_per_item) {
          items.push_back({r, head, row, std::min(rows_per_item, rows - row)});
        }
      }
    }
    return items;
  };
  std::int64_t rows_per_item = kMaxRows;
  std::vector<Item> items = list(rows_per_item);
  while (rows_per_item > 4 && std::int64_t(items.size()) < num_threads()) {
    rows_per_item /= 2;
    items = list(rows_per_item);
  }
  return items;
}

Tile tile_of(const Problem& p, const Item& item) {
  const std::int64_t group = p.q.size(1) / p.num_kv_heads;
  const std::int64_t first = p.cu_seqlens_q.as<std::int32_t>()[item.request];
  const std::int64_t q_len = p.cu_seqlens_q.as<std::int32_t>()[item.request + 1] - first;
  const std::int64_t bytes = dtype_bytes(p.q.dtype);
  const std::int64_t kv_bytes = dtype_bytes(p.kv_cache.dtype);
  const std::int64_t head = item.kv_head * group;
  Tile t;
  t.q = p.q.as<char>() + (first * p.q.stride(0) + head * p.q.stride(1)) * bytes;
  t.out = p.out.as<char>() + (first * p.out.stride(0) + head * p.out.stride(1)) * bytes;
  t.dtype = p.q.dtype;
  t.q_token_stride = p.q.stride(0);
  t.q_head_stride = p.q.stride(1);
  t.out_token_stride = p.out.stride(0);
  t.out_head_stride = p.out.stride(1);
  t.group = group;
  t.first_row = item.first_row;
  t.num_rows = item.num_rows;
  t.first_keys = p.seq_lens.as<std::int32_t>()[item.request] - q_len + 1;
  t.keys = p.kv_cache.as<char>() + item.kv_head * p.head_stride * kv_bytes;
  t.kv_dtype = p.kv_cache.dtype;
  t.table = p.block_tables.as<std::int32_t>() + item.request * p.block_tables.stride(0);
  t.block_size = p.block_size;
  t.block_stride = p.kv_cache.stride(0);
  t.token_stride = p.token_stride;
  t.value_offset = p.value_offset;
  t.head_dim_qk = p.q.size(2);
  t.head_dim_v = p.out.size(2);
  t.scale = p.scale;
  if (p.kv_scale) {
    t.scale_block_stride = p.kv_scale.stride(0);
    t.kv_scale = p.kv_scale.as<float>();
    if (p.pe_cache) {
      t.latent = p.kv_cache.size(2);
      t.scale_token_stride = p.kv_scale.stride(1);
      t.pe = p.pe_cache.data;
      t.pe_dtype = p.pe_cache.dtype;
      t.pe_block_stride = p.pe_cache.stride(0);
      t.pe_token_stride = p.pe_cache.stride(1);
    } else {
      t.kv_scale += item.kv_head * p.kv_scale.stride(2);
      t.scale_token_stride = 1;
      t.scale_value_offset = p.kv_scale.stride(1);
    }
  }
  return t;
}

void run(const Problem& p) {
  check_values(p);
  const std::int32_t* starts = p.cu_seqlens_q.as<std::int32_t>();
  for (std::int64_t r = 0; r < p.seq_lens.size(0); ++r) {
    if (p.seq_lens.as<std::int32_t>()[r] == 0) zero_rows(p, starts[r], starts[r + 1]);
  }
  const std::vector<Item> items = split(p);
  const AttendTile attend_tile =
      table_of_isa(&attend_tile_portable, &attend_tile_avx2, &attend_tile_avx512);
  // Threads take the next item when they are free, the longest (last) rows first.
  std::atomic<std::int64_t> left{std::int64_t(items.size())};
  const std::int64_t workers = std::min<std::int64_t>(num_threads(), std::int64_t(items.size()));
  parallel_for(0, workers, 1, [&](std::int64_t a, std::int64_t b) {
    if (a == b) return;
    thread_local std::vector<float> scratch;
    scratch.resize(std::size_t(tile_scratch(p.q.size(2), p.out.size(2), bool(p.kv_scale))));
    for (std::int64_t i; (i = left.fetch_sub(1) - 1) >= 0;) {
      attend_tile(tile_of(p, items[std::size_t(i)]), scratch.data());
    }
  });
}

}  // namespace

std::int64_t tile_scratch(std::int64_t head_dim_qk, std::int64_t head_dim_v, bool has_codes) {
  const auto padded = [](std::int64_t n) { return (n + 15) / 16 * 16; };
  const std::int64_t widths = padded(head_dim_qk) + padded(head_dim_v);
  return kMaxRows * (widths + kKeyBlock + 2) + (has_codes ? kKeyBlock * widths : 0);
}

void attention_cpu(const AttentionParams& p) {
  run({p.q, p.block_tables, p.cu_seqlens_q, p.seq_lens, p.out, p.kv_cache, p.kv_scale, TensorView{},
       p.kv_cache.size(2), p.kv_cache.size(3), p.kv_cache.stride(2), p.kv_cache.stride(3),
       p.kv_cache.stride(1), p.scale, p.max_seqlen_q, p.max_seq_len});
}

void mla_attention_cpu(const MlaAttentionParams& p) {
  run({p.q, p.block_tables, p.cu_seqlens_q, p.seq_lens, p.out, p.kv_cache, p.kv_scale, p.pe_cache,
       p.kv_cache.size(1), 1, p.kv_cache.stride(1), 0, 0, p.scale, p.max_seqlen_q, p.max_seq_len});
}

}  // namespace fastgpt::attention
