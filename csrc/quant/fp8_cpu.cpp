#include <algorithm>
#include <cmath>

#include "fastgpt/dispatch.h"
#include "fastgpt/fp8.h"
#include "fastgpt/thread_pool.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

/// Rows and columns that share a scale, and where the scale stands.
struct Groups {
  explicit Groups(const Fp8Params& p)
      : per_block(p.scale.ndim == 2),
        rows(per_block ? kBlock : 1),
        cols(per_block ? kBlock : p.x.size(1)),
        per_row(per_block ? p.scale.size(1) : 1) {}
  bool per_block;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t per_row;
};

}  // namespace

void quantize_fp8_cpu(const Fp8Params& p) {
  const Groups groups(p);
  const std::int64_t rows = p.x.size(0);
  const std::int64_t cols = p.x.size(1);
  dispatch_float(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(0, p.scale.size(0), 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first * groups.per_row; i < last * groups.per_row; ++i) {
        const std::int64_t row0 = i / groups.per_row * groups.rows;
        const std::int64_t col0 = i % groups.per_row * groups.cols;
        const std::int64_t row1 = std::min(rows, row0 + groups.rows);
        const std::int64_t col1 = std::min(cols, col0 + groups.cols);
        float amax = 0.0F;
        for (std::int64_t r = row0; r < row1; ++r) {
          const T* x = p.x.as<T>() + r * p.x.stride(0);
          for (std::int64_t c = col0; c < col1; ++c) {
            const float magnitude = std::fabs(to_float(x[c]));
            FASTGPT_CHECK(magnitude <= std::numeric_limits<float>::max(), "x[", r, ", ", c, "] is ",
                          to_float(x[c]), "; only finite values can be quantized");
            amax = std::max(amax, magnitude);
          }
        }
        float scale = amax / kFp8Largest;
        if (!(scale > 0.0F)) scale = 1.0F;
        p.scale.as<float>()[i] = scale;
        for (std::int64_t r = row0; r < row1; ++r) {
          const T* x = p.x.as<T>() + r * p.x.stride(0);
          std::uint8_t* packed = p.packed.as<std::uint8_t>() + r * cols;
          for (std::int64_t c = col0; c < col1; ++c) {
            packed[c] =
                from_float<Fp8>(std::clamp(to_float(x[c]) / scale, -kFp8Largest, kFp8Largest)).bits;
          }
        }
      }
    });
  });
}

void dequantize_fp8_cpu(const Fp8Params& p) {
  const Groups groups(p);
  const std::int64_t cols = p.x.size(1);
  float table[256];
  for (int code = 0; code < 256; ++code) table[code] = to_float(Fp8{std::uint8_t(code)});
  dispatch_float(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(0, p.x.size(0), 1 + 16384 / cols, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t r = first; r < last; ++r) {
        const float* scale = p.scale.as<float>() + r / groups.rows * groups.per_row;
        const std::uint8_t* packed = p.packed.as<std::uint8_t>() + r * cols;
        T* x = p.x.as<T>() + r * p.x.stride(0);
        for (std::int64_t c = 0; c < cols; ++c) {
          x[c] = from_float<T>(table[packed[c]] * scale[c / groups.cols]);
        }
      }
    });
  });
}

}  // namespace fastgpt::quant
