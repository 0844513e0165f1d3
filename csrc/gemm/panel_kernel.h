// The product kernels, written once over a 16-lane vector type V of one instruction set. Included
// by exactly one panel_<isa>.cpp each, after it defined V: everything is in an unnamed namespace,
// so that no function compiled with one set's flags is linked into another's.
//
// One lane is one output column. An output is
//     sum over segments of scale * (sum over k in the segment of x[k] * w[k])
// with the inner sum one chain of multiply-adds in the order of k. Few rows keep their sums in
// registers and unpack weights on the fly (decode: every weight byte is read once, in order); more
// rows unpack a segment of one block to scratch and reuse it. Both run the same chain, so the bits
// of a row do not depend on the number of rows.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "fastgpt/check.h"
#include "fastgpt/half.h"
#include "gemm/cpu_layout.h"
#include "gemm/panel.h"

namespace fastgpt::gemm {
namespace {

constexpr std::int64_t kRowChunk = 256;        // rows whose totals stay in L2
constexpr std::int64_t kBlockChunk = 4;        // blocks that share one pass over x
constexpr std::int64_t kPrefetchBytes = 2048;  // how far decode reads ahead of itself

template <int N, class Fn>
[[gnu::always_inline]] inline void unroll(Fn&& fn) {
  [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
    (fn(std::integral_constant<int, J>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Thread-local, 64-byte aligned, grows, lives as long as the thread.
struct Scratch {
  ~Scratch() { std::free(data); }
  template <class T>
  T* reserve(std::int64_t count) {
    const std::size_t bytes = std::size_t(count) * sizeof(T);
    if (bytes > capacity) {
      std::free(data);
      capacity = (bytes + 4095) / 4096 * 4096;
      data = std::aligned_alloc(64, capacity);
      if (data == nullptr) {
        capacity = 0;
        detail::fail<OutOfMemory>(__FILE__, __LINE__, "no host memory for ", bytes,
                                  " bytes of kernel scratch");
      }
    }
    return static_cast<T*>(data);
  }
  void* data = nullptr;
  std::size_t capacity = 0;
};
thread_local Scratch g_totals;
thread_local Scratch g_unpacked;

// Loaders: a panel's step of 8 x 16 values as float vectors, one per k ---------------------------

struct LoadF32 {
  static constexpr std::int64_t kBytes = 512;
  template <int J>
  static V::F get(const std::uint8_t* w) {
    return V::load(reinterpret_cast<const float*>(w) + J * 16);
  }
};
struct LoadF16 {
  static constexpr std::int64_t kBytes = 256;
  template <int J>
  static V::F get(const std::uint8_t* w) {
    return V::from_half(reinterpret_cast<const std::uint16_t*>(w) + J * 16);
  }
};
struct LoadBF16 {
  static constexpr std::int64_t kBytes = 256;
  template <int J>
  static V::F get(const std::uint8_t* w) {
    const V::I raw = V::load_i(w + J / 2 * 64);
    return J % 2 == 0 ? V::bf16_low(raw) : V::bf16_high(raw);
  }
};
struct LoadFp8 {
  static constexpr std::int64_t kBytes = 128;
  template <int J>
  static V::F get(const std::uint8_t* w) {
    constexpr int kByte[4] = {0, 2, 1, 3};
    return V::template e4m3<8 * kByte[J % 4]>(V::load_i(w + J / 4 * 64));
  }
};
struct LoadInt8 {
  static constexpr std::int64_t kBytes = 128;
  template <int J>
  static V::F get(const std::uint8_t* w) {
    constexpr int kByte[4] = {0, 2, 1, 3};
    return V::template signed_byte<8 * kByte[J % 4]>(V::load_i(w + J / 4 * 64));
  }
};
struct LoadInt4 {
  static constexpr std::int64_t kBytes = 64;
  template <int J>
  static V::F get(const std::uint8_t* w) {
    return V::template nibble<J % 2 * 16 + J / 2 * 4>(V::load_i(w));
  }
};

struct ComputeF32 {
  using X = float;
  using Dense = LoadF32;  // what a segment is unpacked to
  static constexpr int kSubs = 8;
  static V::F mac(V::F acc, const X* x, int j, V::F b) { return V::fma(V::set1(x[j]), b, acc); }
  static void store(std::uint8_t* out, int j, V::F b) {
    V::store(reinterpret_cast<float*>(out) + j * 16, b);
  }
  static X from(float value) { return value; }
  /// Store the values of one 32-bit word a column: one k of float, two of a 16-bit T.
  template <class T>
  static void store_word(X* out, V::I word) {
    if constexpr (std::is_same_v<T, float>) {
      V::store(out, V::as_float(word));
    } else if constexpr (std::is_same_v<T, Half>) {
      V::store(out, V::half_low(word));
      V::store(out + 16, V::half_high(word));
    } else {
      V::store(out, V::bf16_low(word));
      V::store(out + 16, V::bf16_high(word));
    }
  }
  /// Position of value k of column c in an unpacked block.
  static std::int64_t at(std::int64_t c, std::int64_t k) {
    return k / kStep * kStep * kBlockColumns + c / 16 * kStep * 16 + k % kStep * 16 + c % 16;
  }
};

// Segments ---------------------------------------------------------------------------------------

/// Columns of `segment` in `block`: total += scale * sum, panel by panel.
struct SegmentEnd {
  const PanelTask& t;
  std::int64_t segment;
  std::int64_t block;

  void add(float* total, V::F sum, int panel, std::int64_t row) const {
    const std::int64_t block_of_panel = block + panel / kPanels;
    const V::F old = V::load(total);
    if (t.group_scale) {
      const std::int64_t at = (block_of_panel * t.num_segments() + segment) * kBlockColumns +
                              panel % kPanels * kPanelColumns;
      if (t.zero_point) {
        // sum x (code - zp) = sum x (code - 8) - (zp - 8) sum x
        const V::F zero = V::sub(V::from_u8(t.zero_point + at), V::set1(8.0F));
        sum = V::fnma(zero, V::set1(t.x_sums[row][segment]), sum);
      }
      V::store(total, V::fma(V::from_half(t.group_scale + at), sum, old));
    } else if (t.block_scale) {
      const float scale = t.block_scale[block_of_panel / 2 * t.num_segments() + segment];
      V::store(total, V::fma(V::set1(scale), sum, old));
    } else {
      V::store(total, V::add(old, sum));
    }
  }
};

/// M rows x P panels of one segment. Panels 0..3 start at w0, 4..7 (the next block) at w1.
template <class C, class L, int M, int P, bool kStream>
void run_tile(const SegmentEnd& end, const void* const* x, std::int64_t first_row,
              const std::uint8_t* w0, const std::uint8_t* w1, std::int64_t first_step,
              std::int64_t steps, int panel0, float* totals, std::int64_t totals_stride) {
  using X = typename C::X;
  V::F acc[M][P];
  const X* xs[M];
  unroll<M>([&](auto m) {
    xs[m] = static_cast<const X*>(x[first_row + m]) + first_step * kStep;
    unroll<P>([&](auto p) { acc[m][p] = V::zero(); });
  });
  for (std::int64_t s = 0; s < steps; ++s) {
    if constexpr (kStream) {
      unroll<P>([&](auto p) {
        const std::uint8_t* w = (p < 4 ? w0 : w1) + p % 4 * L::kBytes + kPrefetchBytes;
        unroll<L::kBytes / 64>([&](auto line) { __builtin_prefetch(w + line * 64, 0, 3); });
      });
    }
    unroll<C::kSubs>([&](auto j) {
      unroll<P>([&](auto p) {
        const auto b = L::template get<j>((p < 4 ? w0 : w1) + p % 4 * L::kBytes);
        unroll<M>([&](auto m) { acc[m][p] = C::mac(acc[m][p], xs[m], j, b); });
      });
    });
    w0 += kPanels * L::kBytes;
    if constexpr (P > 4) w1 += kPanels * L::kBytes;
    unroll<M>([&](auto m) { xs[m] += kStep; });
  }
  unroll<M>([&](auto m) {
    unroll<P>([&](auto p) {
      end.add(totals + m * totals_stride + (panel0 + p) * kPanelColumns, acc[m][p], panel0 + p,
              first_row + m);
    });
  });
}

/// All four panels of one block for M rows.
template <class C, class L, int M, int P, bool kStream>
void run_block(const SegmentEnd& end, const void* const* x, std::int64_t first_row,
               const std::uint8_t* w, std::int64_t first_step, std::int64_t steps, float* totals,
               std::int64_t totals_stride) {
  for (int panel = 0; panel < kPanels; panel += P) {
    run_tile<C, L, M, P, kStream>(end, x, first_row, w + panel * L::kBytes, nullptr, first_step,
                                  steps, panel, totals, totals_stride);
  }
}

/// Rows first_row .. first_row + count - 1, count <= kMax, of one block.
template <class C, class L, int kMax, bool kStream>
void run_rows(std::int64_t count, const SegmentEnd& end, const void* const* x,
              std::int64_t first_row, const std::uint8_t* w, std::int64_t first_step,
              std::int64_t steps, float* totals, std::int64_t totals_stride) {
  unroll<kMax>([&](auto m) {
    if (count == m + 1) {
      run_block<C, L, m + 1, V::panels(m + 1), kStream>(end, x, first_row, w, first_step, steps,
                                                        totals, totals_stride);
    }
  });
}

template <class C, class L>
void unpack(const std::uint8_t* w, std::int64_t steps, std::uint8_t* out) {
  for (std::int64_t i = 0; i < steps * kPanels; ++i) {
    unroll<C::kSubs>([&](auto j) { C::store(out, j, L::template get<j>(w)); });
    w += L::kBytes;
    out += C::Dense::kBytes;
  }
}

/// Row-major weight rows to an unpacked segment of one block: 16 x 16 words are transposed in
/// registers, edges go one by one.
template <class C, class T>
void unpack_rows(const PanelTask& t, std::int64_t block, std::int64_t first_step,
                 std::int64_t steps, typename C::X* out) {
  const std::int64_t first_k = first_step * kStep;
  const std::int64_t width = steps * kStep;
  const std::int64_t count = t.k - first_k < width ? t.k - first_k : width;
  for (std::int64_t c0 = 0; c0 < kBlockColumns; c0 += kPanelColumns) {
    const std::int64_t column = block * kBlockColumns + c0;
    const std::uint8_t* rows = t.weight + column * t.row_bytes + first_k * std::int64_t{sizeof(T)};
    std::int64_t done = 0;
    constexpr std::int64_t kPerWord = 4 / sizeof(T);
    constexpr std::int64_t kTile = 16 * kPerWord;
    for (; column + kPanelColumns <= t.n && done + kTile <= count; done += kTile) {
      V::I words[16];
      V::transpose(rows + done * std::int64_t{sizeof(T)}, t.row_bytes,
                   width * std::int64_t{sizeof(T)}, words);
      unroll<16>([&](auto i) {
        C::template store_word<T>(out + C::at(c0, done + i * kPerWord), words[i]);
      });
    }
    for (std::int64_t c = 0; c < kPanelColumns; ++c) {
      const bool inside = column + c < t.n;
      const T* row = reinterpret_cast<const T*>(rows + c * t.row_bytes);
      for (std::int64_t k = done; k < width; ++k) {
        out[C::at(c0 + c, k)] = C::from(inside && k < count ? to_float(row[k]) : 0.0F);
      }
    }
  }
}

/// Finish rows: channel scale, bias, one rounding, only the columns below n.
void store_rows(const PanelTask& t, std::int64_t first_row, std::int64_t rows,
                std::int64_t first_block, std::int64_t blocks, float* totals) {
  const std::int64_t first = first_block * kBlockColumns;
  const std::int64_t width = blocks * kBlockColumns;
  const std::int64_t columns = t.n - first < width ? t.n - first : width;
  for (std::int64_t r = 0; r < rows; ++r) {
    float* total = totals + r * width;
    for (std::int64_t c = 0; c < columns; c += 16) {
      const bool whole = columns - c >= 16;
      float edge[16];
      V::F value = V::load(total + c);
      const auto load = [&](const float* from) {
        if (whole) return V::load(from);
        std::memcpy(edge, from, std::size_t(columns - c) * sizeof(float));
        return V::load(edge);
      };
      if (t.channel_scale && t.bias) {
        value = V::fma(value, load(t.channel_scale + first + c), load(t.bias + first + c));
      } else if (t.channel_scale) {
        value = V::mul(value, load(t.channel_scale + first + c));
      } else if (t.bias) {
        value = V::add(value, load(t.bias + first + c));
      }
      std::uint8_t* row = static_cast<std::uint8_t*>(t.out[first_row + r]);
      std::uint8_t* out = row + (first + c) * dtype_bytes(t.out_dtype);
      alignas(64) std::uint8_t rounded[64];
      std::uint8_t* to = whole ? out : rounded;
      if (t.out_dtype == DType::kF32) {
        V::store(reinterpret_cast<float*>(to), value);
      } else if (t.out_dtype == DType::kBF16) {
        V::store_bf16(reinterpret_cast<std::uint16_t*>(to), value);
      } else {
        V::store_half(reinterpret_cast<std::uint16_t*>(to), value);
      }
      if (!whole) std::memcpy(out, rounded, std::size_t((columns - c) * dtype_bytes(t.out_dtype)));
    }
  }
}

// L: loader of the stored form, LoadRows for a row-major weight.
struct LoadRows {
  static constexpr std::int64_t kBytes = 0;
};

template <class C, class L>
void run_chunk(const PanelTask& t, std::int64_t first_row, std::int64_t rows,
               std::int64_t first_block, std::int64_t blocks) {
  using Dense = typename C::Dense;
  constexpr bool kRows = std::is_same_v<L, LoadRows>;
  constexpr bool kIsDense = std::is_same_v<L, Dense>;
  const std::int64_t stride = blocks * kBlockColumns;
  const std::int64_t block_bytes = t.steps * kPanels * L::kBytes;
  float* totals = g_totals.reserve<float>(rows * stride);
  std::memset(totals, 0, std::size_t(rows * stride) * sizeof(float));
  std::uint8_t* unpacked =
      g_unpacked.reserve<std::uint8_t>(t.segment_steps * kPanels * Dense::kBytes);
  std::int64_t segment = 0;
  for (std::int64_t step = 0; step < t.steps; step += t.segment_steps, ++segment) {
    const std::int64_t steps = t.steps - step < t.segment_steps ? t.steps - step : t.segment_steps;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t block = first_block + b;
      const SegmentEnd end{t, segment, block};
      const std::uint8_t* w = t.weight + block * block_bytes + step * kPanels * L::kBytes;
      float* block_totals = totals + b * kBlockColumns;
      if constexpr (!kRows) {
        if (V::kPairsOfBlocks && rows == 1 && b + 1 < blocks) {
          run_tile<C, L, 1, V::kPairsOfBlocks ? 8 : 1, true>(
              end, t.x, first_row, w, w + block_bytes, step, steps, 0, block_totals, stride);
          ++b;
          continue;
        }
        if (rows <= V::kStreamRows) {
          run_rows<C, L, V::kStreamRows, true>(rows, end, t.x, first_row, w, step, steps,
                                               block_totals, stride);
          continue;
        }
      }
      const std::uint8_t* dense = unpacked;
      if constexpr (kIsDense) {
        dense = w;
      } else if constexpr (kRows) {
        auto* out = reinterpret_cast<typename C::X*>(unpacked);
        if constexpr (!std::is_same_v<C, ComputeF32>) {
          unpack_rows<C, BFloat16>(t, block, step, steps, out);
        } else if (t.row_dtype == DType::kF32) {
          unpack_rows<C, float>(t, block, step, steps, out);
        } else if (t.row_dtype == DType::kF16) {
          unpack_rows<C, Half>(t, block, step, steps, out);
        } else {
          unpack_rows<C, BFloat16>(t, block, step, steps, out);
        }
      } else {
        unpack<C, L>(w, steps, unpacked);
      }
      for (std::int64_t r = 0; r < rows; r += V::kTileRows) {
        const std::int64_t count = rows - r < V::kTileRows ? rows - r : V::kTileRows;
        run_rows<C, Dense, V::kTileRows, false>(count, end, t.x, first_row + r, dense, step, steps,
                                                block_totals + r * stride, stride);
      }
    }
  }
  store_rows(t, first_row, rows, first_block, blocks, totals);
}

template <class C, class L>
void run(const PanelTask& t) {
  for (std::int64_t r = 0; r < t.num_rows; r += kRowChunk) {
    const std::int64_t rows = t.num_rows - r < kRowChunk ? t.num_rows - r : kRowChunk;
    for (std::int64_t b = t.block_begin; b < t.block_end; b += kBlockChunk) {
      const std::int64_t blocks = t.block_end - b < kBlockChunk ? t.block_end - b : kBlockChunk;
      run_chunk<C, L>(t, r, rows, b, blocks);
    }
  }
}

void run_f32(const PanelTask& t) {
  switch (t.storage) {
    case Storage::kF32:
      return run<ComputeF32, LoadF32>(t);
    case Storage::kF16:
      return run<ComputeF32, LoadF16>(t);
    case Storage::kBF16:
      return run<ComputeF32, LoadBF16>(t);
    case Storage::kFp8:
      return run<ComputeF32, LoadFp8>(t);
    case Storage::kInt8:
      return run<ComputeF32, LoadInt8>(t);
    case Storage::kInt4:
      return run<ComputeF32, LoadInt4>(t);
    case Storage::kRowMajor:
      return run<ComputeF32, LoadRows>(t);
  }
}

}  // namespace
}  // namespace fastgpt::gemm
