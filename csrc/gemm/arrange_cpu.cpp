#include <cstring>

#include "fastgpt/check.h"
#include "fastgpt/thread_pool.h"
#include "gemm/cpu_layout.h"
#include "gemm/kernels.h"

namespace fastgpt::gemm {
namespace {

// One block of a dense weight of 16- or 32-bit values.
template <class T, bool kPairs>
void arrange_dense_block(const T* weight, std::int64_t k, std::int64_t columns, T* out) {
  const std::int64_t steps = ceil_div(k, kStep);
  std::memset(out, 0, std::size_t(steps * kStep * kBlockColumns) * sizeof(T));
  for (std::int64_t c = 0; c < columns; ++c) {
    const std::int64_t lane = c % kPanelColumns;
    T* panel = out + c / kPanelColumns * kStep * kPanelColumns;
    for (std::int64_t i = 0; i < k; ++i) {
      const std::int64_t j = i % kStep;
      const std::int64_t at =
          kPairs ? (j / 2 * kPanelColumns + lane) * 2 + j % 2 : j * kPanelColumns + lane;
      panel[i / kStep * kStep * kBlockColumns + at] = weight[c * k + i];
    }
  }
}

// One block of codes of a byte, fp8 or int8.
void arrange_byte_block(const std::uint8_t* codes, bool is_fp8, std::int64_t k,
                        std::int64_t columns, std::uint8_t* out) {
  constexpr std::int64_t kByte[4] = {0, 2, 1, 3};
  const std::int64_t steps = ceil_div(k, kStep);
  std::memset(out, 0, std::size_t(steps * kStep * kBlockColumns));
  for (std::int64_t c = 0; c < columns; ++c) {
    std::uint8_t* panel = out + c / kPanelColumns * kStep * kPanelColumns;
    const std::int64_t lane = c % kPanelColumns;
    for (std::int64_t i = 0; i < k; ++i) {
      const std::uint8_t code = codes[c * k + i];
      FASTGPT_CHECK(!is_fp8 || (code & 0x7F) != 0x7F, "weight has the NaN code ", int(code),
                    " at column ", i,
                    " of a row; expected finite fp8 codes, quantize the weight again");
      const std::int64_t j = i % kStep;
      panel[i / kStep * kStep * kBlockColumns + j / 4 * 64 + lane * 4 + kByte[j % 4]] = code;
    }
  }
}

void arrange_int4_block(const std::uint8_t* packed, std::int64_t row_bytes, const KLayout& layout,
                        std::int64_t columns, std::uint8_t* out) {
  const std::int64_t step_bytes = kBlockColumns * 4;
  std::memset(out, 0, std::size_t(layout.steps() * step_bytes));
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t i = 0; i < layout.k; ++i) {
      const std::uint8_t byte = packed[c * row_bytes + i / 2];
      const unsigned code = (i % 2 == 0 ? byte & 0xFU : unsigned(byte) >> 4) ^ 8U;
      const std::int64_t at = layout.position(i);
      const std::int64_t j = at % kStep;
      std::uint8_t* word = out + at / kStep * step_bytes + c * 4;
      word[j % 2 * 2 + j / 4] |= std::uint8_t(code << (j / 2 % 2 * 4));
    }
  }
}

template <class T>
void arrange_groups(const T* values, std::int64_t n, std::int64_t groups, T* out) {
  std::memset(static_cast<void*>(out), 0,
              std::size_t(ceil_div(n, kBlockColumns) * kBlockColumns * groups) * sizeof(T));
  for (std::int64_t c = 0; c < n; ++c) {
    for (std::int64_t g = 0; g < groups; ++g) {
      out[(c / kBlockColumns * groups + g) * kBlockColumns + c % kBlockColumns] =
          values[c * groups + g];
    }
  }
}

}  // namespace

ArrangedShape arranged_shape_cpu(WeightFormat format, std::int64_t n, std::int64_t k,
                                 int group_size) {
  const KLayout layout = k_layout(format, k, group_size);
  const std::int64_t blocks = ceil_div(n, kBlockColumns);
  ArrangedShape shape;
  const std::int64_t per_step = format == WeightFormat::kInt4 ? 4 : kStep;
  shape.packed = {blocks, layout.steps(), kBlockColumns * per_step};
  if (format == WeightFormat::kInt4) {
    shape.scale = {blocks, layout.num_groups(), kBlockColumns};
    shape.zero_point = shape.scale;
  }
  return shape;
}

void arrange_weight_cpu(const ArrangeParams& p) {
  const std::int64_t stacked = p.weight.ndim == 3 ? p.weight.size(0) : 1;
  const std::int64_t n = p.weight.size(-2);
  const std::int64_t row_bytes = p.weight.size(-1) * dtype_bytes(p.weight.dtype);
  const std::int64_t blocks = ceil_div(n, kBlockColumns);
  const std::int64_t block_bytes =
      p.out_packed.size(-1) * p.out_packed.size(-2) * dtype_bytes(p.out_packed.dtype);
  const KLayout layout = k_layout(p.format, p.k, p.group_size);
  parallel_for(0, stacked * blocks, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t row = i % blocks * kBlockColumns;
      const std::int64_t columns = n - row < kBlockColumns ? n - row : kBlockColumns;
      const std::uint8_t* in = p.weight.as<std::uint8_t>() + (i / blocks * n + row) * row_bytes;
      std::uint8_t* out = p.out_packed.as<std::uint8_t>() + i * block_bytes;
      if (p.format == WeightFormat::kFp8 || p.format == WeightFormat::kInt8) {
        arrange_byte_block(in, p.format == WeightFormat::kFp8, p.k, columns, out);
      } else if (p.format == WeightFormat::kInt4) {
        arrange_int4_block(in, row_bytes, layout, columns, out);
      } else if (p.weight.dtype == DType::kF32) {
        arrange_dense_block<std::uint32_t, false>(reinterpret_cast<const std::uint32_t*>(in), p.k,
                                                  columns, reinterpret_cast<std::uint32_t*>(out));
      } else if (p.weight.dtype == DType::kF16) {
        arrange_dense_block<std::uint16_t, false>(reinterpret_cast<const std::uint16_t*>(in), p.k,
                                                  columns, reinterpret_cast<std::uint16_t*>(out));
      } else {
        arrange_dense_block<std::uint16_t, true>(reinterpret_cast<const std::uint16_t*>(in), p.k,
                                                 columns, reinterpret_cast<std::uint16_t*>(out));
      }
    }
  });
  if (p.format == WeightFormat::kFp8 || p.format == WeightFormat::kInt8) {
    std::memcpy(p.out_scale.data, p.scale.data, std::size_t(p.scale.numel()) * sizeof(float));
  } else if (p.format == WeightFormat::kInt4) {
    const std::int64_t groups = layout.num_groups();
    for (std::int64_t e = 0; e < stacked; ++e) {
      const std::int64_t out_at = e * blocks * groups * kBlockColumns;
      arrange_groups(p.scale.as<std::uint16_t>() + e * n * groups, n, groups,
                     p.out_scale.as<std::uint16_t>() + out_at);
      if (!p.zero_point) continue;
      arrange_groups(p.zero_point.as<std::uint8_t>() + e * n * groups, n, groups,
                     p.out_zero_point.as<std::uint8_t>() + out_at);
    }
  }
}

}  // namespace fastgpt::gemm
