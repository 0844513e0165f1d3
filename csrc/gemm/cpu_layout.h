// The CPU kernels' weight layout, one for every instruction set.
//
// A weight [n, k] is cut into blocks of 64 output columns, a block into steps of 8 values along k,
// a step into 4 panels of 16 columns, one column a SIMD lane:
//
//     packed[block][step][panel][bytes of 8 x 16 values]
//
// so the whole block is one sequential stream. Inside a panel's step (lane = column, k = 0..7):
//     float32, float16   [k][lane]
//     bfloat16           [k / 2][lane][k % 2]                  pairs, as vdpbf16ps takes them
//     fp8, int8          [k / 4][lane][byte b]: k % 4 = 0 2 1 3 for b = 0 1 2 3, so that the low
//                        bytes of the two 16-bit halves are one pair and the high bytes the next
//     int4               [lane], one 32-bit word: k = 0 2 4 6 in the nibbles of its low half,
//                        k = 1 3 5 7 in the high half; nibble = code ^ 8, code - 8 in two's
//                        complement
// Columns past n and values past k are zeros. int4 groups start at a step: a group whose size is
// not a multiple of 8 is padded, and x is spread the same way (see spread_row in rows.h).
// int4 scales and zero points: [block][group][64].
#pragma once
#include <cstdint>

#include "fastgpt/gemm.h"

namespace fastgpt::gemm {

inline constexpr std::int64_t kBlockColumns = 64;
inline constexpr std::int64_t kPanelColumns = 16;
inline constexpr std::int64_t kPanels = kBlockColumns / kPanelColumns;
inline constexpr std::int64_t kStep = 8;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// How k maps to steps: int4 pads every group to whole steps.
struct KLayout {
  std::int64_t k;
  std::int64_t group_size;  // k itself where there are no groups

  std::int64_t group_steps() const { return ceil_div(group_size, kStep); }
  std::int64_t num_groups() const { return k == 0 ? 0 : ceil_div(k, group_size); }
  std::int64_t steps() const {
    if (k == 0) return 0;
    const std::int64_t full = k / group_size;
    return full * group_steps() + ceil_div(k - full * group_size, kStep);
  }
  /// Where value i of a row stands among steps() * 8 positions.
  std::int64_t position(std::int64_t i) const {
    return i / group_size * group_steps() * kStep + i % group_size;
  }
  bool is_identity() const { return group_size % kStep == 0 || group_size >= k; }
};

inline KLayout k_layout(WeightFormat format, std::int64_t k, int group_size) {
  return {k, format == WeightFormat::kInt4 ? group_size : (k > 0 ? k : 1)};
}

}  // namespace fastgpt::gemm
