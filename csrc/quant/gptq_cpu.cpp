#include <algorithm>
#include <cmath>

#include "fastgpt/thread_pool.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

constexpr std::int64_t kRows = 64;  // of the weight at a time: their block stays in cache

}  // namespace

// Rows of the weight do not see each other, so threads share them out.
void gptq_round_cpu(const GptqParams& p) {
  const std::int64_t cols = p.left.size(0), rows = p.left.size(1);
  const auto top = float(p.top);
  parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      const std::int64_t first = chunk * kRows;
      const std::int64_t count = std::min(kRows, rows - first);
      float work[kMaxGptqCols][kRows];
      for (std::int64_t i = 0; i < cols; ++i)
        std::copy_n(p.left.as<float>() + i * p.left.stride(0) + first, count, work[i]);
      for (std::int64_t i = 0; i < cols; ++i) {
        const float* factor = p.spread.as<float>() + i * p.spread.stride(0);
        const float* scale = p.scale.as<float>() + i * p.scale.stride(0) + first;
        const float* zero = p.zero.as<float>() + i * p.zero.stride(0) + first;
        std::uint8_t* code = p.codes.as<std::uint8_t>() + i * p.codes.stride(0) + first;
        float* error = p.errors.as<float>() + i * p.errors.stride(0) + first;
        for (std::int64_t r = 0; r < count; ++r) {
          const float wanted = std::nearbyint(work[i][r] / scale[r]) + zero[r];
          const float clamped = std::min(std::max(wanted, 0.0F), top);
          code[r] = std::uint8_t(clamped);
          error[r] = (work[i][r] - (clamped - zero[r]) * scale[r]) / factor[i];
        }
        for (std::int64_t j = i + 1; j < cols; ++j)
          for (std::int64_t r = 0; r < count; ++r) work[j][r] -= error[r] * factor[j];
      }
    }
  });
}

}  // namespace fastgpt::quant
