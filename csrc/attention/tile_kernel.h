// The kernel of one tile, included by one tile_<isa>.cpp each. Streaming softmax over blocks of
// keys (FlashAttention-2, arXiv:2307.08691), everything in float32:
//
//     for each block of 64 keys:   s = scale * q k^T,  m' = max(m, s),  p = 2^(s - m')
//                                  o = o * 2^(m - m') + p v,  l = l * 2^(m - m') + sum p
//
// Keys and values are read from the cache once a tile and shared by its rows: by the heads of a
// group at decode, by the tokens of a chunk too at prefill. A row's own operations do not depend on
// the others: a key it does not see has weight 0.
//
// Codes become float32 rows once a block of keys and tile, each times its scale.
#pragma once
#include <type_traits>

#include "attention/tile.h"
#include "fastgpt/kv_format.h"
#include "fastgpt/simd.h"

namespace fastgpt::attention {
namespace {

using namespace simd;

constexpr float kNever = -__builtin_inff();
constexpr std::int64_t kPad = 16;  // scratch rows are padded to the widest vector
#ifdef __AVX512F__
constexpr int kRowsAtOnce = 4;  // 16 sums in registers
#else
constexpr int kRowsAtOnce = 2;  // 8 sums
#endif
constexpr int kKeysAtOnce = 4;
constexpr int kColumnsAtOnce = 4;  // vectors

constexpr std::int64_t padded(std::int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct Scratch {
  float* q;         // [num_rows, padded(head_dim_qk)]
  float* sums;      // [num_rows, padded(head_dim_v)], o of the recurrence
  float* scores;    // [num_rows, kKeyBlock]
  float* largest;   // [num_rows]
  float* total;     // [num_rows]
  float* expanded;  // of codes: [kKeyBlock, q_width + v_width], a key and its value each
  std::int64_t q_width, v_width;
};

// scores of kRows rows against the block's keys, a step of kKeysAtOnce keys at a time.
template <int kRows, class C>
void score_rows(const float* q, std::int64_t q_width, const C* const* keys, std::int64_t num_keys,
                std::int64_t dim, float* scores) {
  for (std::int64_t first = 0; first < num_keys; first += kKeysAtOnce) {
    const C* key[kKeysAtOnce];
    for (int j = 0; j < kKeysAtOnce; ++j) {  // past the end: the last key again, overwritten later
      key[j] = keys[first + j < num_keys ? first + j : num_keys - 1];
    }
    Vec sum[kRows][kKeysAtOnce];
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kKeysAtOnce; ++j) sum[r][j] = set1(0.0F);
    }
    std::int64_t c = 0;
    for (; c + kWidth <= dim; c += kWidth) {
      Vec k[kKeysAtOnce];
      for (int j = 0; j < kKeysAtOnce; ++j) k[j] = load(key[j] + c);
      for (int r = 0; r < kRows; ++r) {
        const Vec x = load(q + r * q_width + c);
        for (int j = 0; j < kKeysAtOnce; ++j) sum[r][j] = fma(x, k[j], sum[r][j]);
      }
    }
    if (c < dim) {
      for (int j = 0; j < kKeysAtOnce; ++j) {
        const Vec k = load(key[j] + c, int(dim - c));
        for (int r = 0; r < kRows; ++r) {
          sum[r][j] = fma(load(q + r * q_width + c, int(dim - c)), k, sum[r][j]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      sum_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kKeyBlock + first);
    }
  }
}

// One row's step of the recurrence but for the values; returns the factor of its sums.
float weigh_row(float* scores, std::int64_t seen, float scale, float& largest, float& total) {
  for (std::int64_t j = seen < 0 ? 0 : seen; j < kKeyBlock; ++j) scores[j] = kNever;
  Vec block_largest = set1(kNever);
  for (int j = 0; j < kKeyBlock; j += kWidth) {
    const Vec s = load(scores + j) * set1(scale);
    store(scores + j, s);
    block_largest = max(s, block_largest);
  }
  const float before = largest;
  const float block = max_of(block_largest);
  largest = block > before ? block : before;
  // Without a finite score yet, subtract 0: the weights become 0 (or NaN, which must stay).
  const Vec shift = set1(largest == kNever ? 0.0F : largest);
  Vec sum = set1(0.0F);
  for (int j = 0; j < kKeyBlock; j += kWidth) {
    const Vec p = exp2(load(scores + j) - shift);
    store(scores + j, p);
    sum = sum + p;
  }
  float lanes[kWidth];
  store(lanes, exp2(set1(before == kNever ? kNever : before - largest)));
  total = total * lanes[0] + sum_of(sum);
  return lanes[0];
}

// sums of kRows rows += their weights times the block's values, kColumns vectors of columns.
template <int kRows, int kColumns, class C>
void add_columns(const float* weights, const C* const* values, std::int64_t num_keys, float* sums,
                 std::int64_t v_width) {
  Vec sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sum[r][c] = load(sums + r * v_width + c * kWidth);
  }
  for (std::int64_t j = 0; j < num_keys; ++j) {
    Vec v[kColumns];
    for (int c = 0; c < kColumns; ++c) v[c] = load(values[j] + c * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vec p = set1(weights[r * kKeyBlock + j]);
      for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(p, v[c], sum[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) store(sums + r * v_width + c * kWidth, sum[r][c]);
  }
}

template <int kRows, class C>
void add_values(const float* weights, const C* const* keys, std::int64_t value_offset,
                std::int64_t num_keys, std::int64_t dim, float* sums, std::int64_t v_width) {
  const C* values[kKeyBlock];
  std::int64_t column = 0;
  const auto at_column = [&] {
    for (std::int64_t j = 0; j < num_keys; ++j) values[j] = keys[j] + value_offset + column;
  };
  for (; column + kColumnsAtOnce * kWidth <= dim; column += kColumnsAtOnce * kWidth) {
    at_column();
    add_columns<kRows, kColumnsAtOnce>(weights, values, num_keys, sums + column, v_width);
  }
  for (; column + kWidth <= dim; column += kWidth) {
    at_column();
    add_columns<kRows, 1>(weights, values, num_keys, sums + column, v_width);
  }
  if (column < dim) {
    at_column();
    const int count = int(dim - column);
    for (int r = 0; r < kRows; ++r) {
      Vec sum = load(sums + r * v_width + column);
      for (std::int64_t j = 0; j < num_keys; ++j) {
        sum = fma(set1(weights[r * kKeyBlock + j]), load(values[j], count), sum);
      }
      store(sums + r * v_width + column, sum);
    }
  }
}

// Call fn with (integral_constant rows, first row) for runs of kRowsAtOnce rows, then one by one.
template <class Fn>
void for_row_groups(std::int64_t num_rows, Fn&& fn) {
  std::int64_t r = 0;
  for (; r + kRowsAtOnce <= num_rows; r += kRowsAtOnce) {
    fn(std::integral_constant<int, kRowsAtOnce>{}, r);
  }
  if constexpr (kRowsAtOnce > 2) {
    for (; r + 2 <= num_rows; r += 2) fn(std::integral_constant<int, 2>{}, r);
  }
  for (; r < num_rows; ++r) fn(std::integral_constant<int, 1>{}, r);
}

// One row of codes times its scale.
template <class C>
void expand_row(const C* codes, float scale, std::int64_t width, float* row) {
  for_each_run(width, [&](std::int64_t i, int n) {
    store_run(row + i, load_run(codes + i, n) * set1(scale), n);
  });
}

// The key in a slot, and its value q_width further on; a latent key is its own value.
template <class C>
void expand_slot(const Tile& t, const Scratch& s, std::int64_t block, std::int64_t offset,
                 float* row) {
  const C* codes = static_cast<const C*>(t.keys) + block * t.block_stride + offset * t.token_stride;
  const float* scale = t.kv_scale + block * t.scale_block_stride + offset * t.scale_token_stride;
  if (t.latent == 0) {
    expand_row(codes, scale[0], t.head_dim_qk, row);
    expand_row(codes + t.value_offset, scale[t.scale_value_offset], t.head_dim_v, row + s.q_width);
    return;
  }
  for (std::int64_t first = 0; first < t.latent; first += kLatentGroup) {
    const std::int64_t left = t.latent - first;
    expand_row(codes + first, scale[first / kLatentGroup],
               left < kLatentGroup ? left : kLatentGroup, row + first);
  }
  with_float(t.pe_dtype, [&](auto tag) {
    expand_row(static_cast<const decltype(tag)*>(t.pe) + block * t.pe_block_stride +
                   offset * t.pe_token_stride,
               1.0F, t.head_dim_qk - t.latent, row + t.latent);
  });
}

// C: the cache's elements. R: those of the rows that are multiplied, float for codes.
template <class C>
void attend(const Tile& t, const Scratch& s) {
  constexpr bool kHasCodes = sizeof(C) == 1;
  using R = std::conditional_t<kHasCodes, float, C>;
  const std::int64_t value_offset = !kHasCodes ? t.value_offset : t.latent == 0 ? s.q_width : 0;
  const auto keys_of_row = [&](std::int64_t r) {
    return t.first_keys + (t.first_row + r) / t.group;
  };
  const std::int64_t num_keys = keys_of_row(t.num_rows - 1);
  const float scale = t.scale * 1.44269504F;  // weights are powers of 2
  for (std::int64_t start = 0; start < num_keys; start += kKeyBlock) {
    const std::int64_t count = num_keys - start < kKeyBlock ? num_keys - start : kKeyBlock;
    const R* keys[kKeyBlock];
    std::int64_t block = start / t.block_size;
    std::int64_t offset = start % t.block_size;
    for (std::int64_t j = 0; j < count; ++j) {
      if constexpr (kHasCodes) {
        float* row = s.expanded + j * (s.q_width + s.v_width);
        expand_slot<C>(t, s, t.table[block], offset, row);
        keys[j] = row;
      } else {
        keys[j] = static_cast<const C*>(t.keys) + t.table[block] * t.block_stride +
                  offset * t.token_stride;
      }
      if (++offset == t.block_size) {
        offset = 0;
        ++block;
      }
    }
    for_row_groups(t.num_rows, [&](auto rows, std::int64_t r) {
      score_rows<rows.value>(s.q + r * s.q_width, s.q_width, keys, count, t.head_dim_qk,
                             s.scores + r * kKeyBlock);
    });
    for (std::int64_t r = 0; r < t.num_rows; ++r) {
      const float factor = weigh_row(s.scores + r * kKeyBlock, keys_of_row(r) - start, scale,
                                     s.largest[r], s.total[r]);
      if (factor == 1.0F) continue;
      float* sums = s.sums + r * s.v_width;
      for (std::int64_t c = 0; c < s.v_width; c += kWidth) {
        store(sums + c, load(sums + c) * set1(factor));
      }
    }
    for_row_groups(t.num_rows, [&](auto rows, std::int64_t r) {
      add_values<rows.value>(s.scores + r * kKeyBlock, keys, value_offset, count, t.head_dim_v,
                             s.sums + r * s.v_width, s.v_width);
    });
  }
}

template <class T>
void load_queries(const Tile& t, const Scratch& s) {
  for (std::int64_t r = 0; r < t.num_rows; ++r) {
    const std::int64_t row = t.first_row + r;
    const T* q = static_cast<const T*>(t.q) + row / t.group * t.q_token_stride +
                 row % t.group * t.q_head_stride;
    for_each_run(t.head_dim_qk, [&](std::int64_t i, int n) {
      store_run(s.q + r * s.q_width + i, load_run(q + i, n), n);
    });
    for (std::int64_t c = 0; c < s.v_width; ++c) s.sums[r * s.v_width + c] = 0.0F;
    s.largest[r] = kNever;
    s.total[r] = 0.0F;
  }
}

template <class T>
void store_results(const Tile& t, const Scratch& s) {
  for (std::int64_t r = 0; r < t.num_rows; ++r) {
    const std::int64_t row = t.first_row + r;
    T* out = static_cast<T*>(t.out) + row / t.group * t.out_token_stride +
             row % t.group * t.out_head_stride;
    const Vec total = set1(s.total[r]);
    for_each_run(t.head_dim_v, [&](std::int64_t i, int n) {
      store_run(out + i, load(s.sums + r * s.v_width + i) / total, n);
    });
  }
}

void attend_tile(const Tile& t, float* scratch) {
  Scratch s;
  s.q_width = padded(t.head_dim_qk);
  s.v_width = padded(t.head_dim_v);
  s.q = scratch;
  s.sums = s.q + kMaxRows * s.q_width;
  s.scores = s.sums + kMaxRows * s.v_width;
  s.largest = s.scores + kMaxRows * kKeyBlock;
  s.total = s.largest + kMaxRows;
  s.expanded = s.total + kMaxRows;
  with_float(t.dtype, [&](auto tag) { load_queries<decltype(tag)>(t, s); });
  if (t.kv_dtype == DType::kU8) {
    attend<Fp8>(t, s);
  } else if (t.kv_dtype == DType::kI8) {
    attend<std::int8_t>(t, s);
  } else {
    with_float(t.kv_dtype, [&](auto tag) { attend<decltype(tag)>(t, s); });
  }
  with_float(t.dtype, [&](auto tag) { store_results<decltype(tag)>(t, s); });
}

}  // namespace
}  // namespace fastgpt::attention
