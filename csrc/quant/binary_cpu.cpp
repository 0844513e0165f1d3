#include <algorithm>
#include <cmath>

#include "fastgpt/dispatch.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

struct TwoLevels {
  float offset;
  float scale;
  float threshold;  // values above it take the upper level
};

/// The two values with the least squared error: exact 2-means of sorted values.
/// Splitting after position i maximizes the between-cluster sum of squares.
TwoLevels two_levels(float* values, int count) {
  std::sort(values, values + count);
  double total = 0.0;
  for (int i = 0; i < count; ++i) total += double(values[i]);
  double best = -1.0;
  int split = count - 1;
  double best_left = total;
  double left = 0.0;
  for (int i = 0; i < count; ++i) {
    left += double(values[i]);
    const double right = total - left;
    const double gain =
        left * left / (i + 1) + (i + 1 < count ? right * right / (count - i - 1) : 0.0);
    if (gain > best) {
      best = gain;
      split = i;
      best_left = left;
    }
  }
  const double low = best_left / (split + 1);
  const double high = split + 1 < count ? (total - best_left) / (count - 1 - split) : low;
  return {float((high + low) / 2), float((high - low) / 2), values[split]};
}

}  // namespace

// Gains of one norm: a few thousand values, so one thread.
void quantize_binary_cpu(const BinaryParams& p) {
  const std::int64_t numel = p.x.size(0);
  std::fill_n(p.packed.as<std::uint8_t>(), p.packed.size(0), std::uint8_t{0});
  dispatch_float(p.x.dtype, [&](auto tag) {
    const auto* x = p.x.as<decltype(tag)>();
    for (std::int64_t first = 0; first < numel; first += kBlock) {
      const std::int64_t last = std::min<std::int64_t>(numel, first + kBlock);
      float values[kBlock];
      for (std::int64_t i = first; i < last; ++i) {
        values[i - first] = to_float(x[i]);
        FASTGPT_CHECK(std::isfinite(values[i - first]), "x[", i, "] is ", values[i - first],
                      "; only finite values can be quantized");
      }
      const TwoLevels levels = two_levels(values, int(last - first));
      p.scale.as<float>()[first / kBlock] = levels.scale;
      p.offset.as<float>()[first / kBlock] = levels.offset;
      for (std::int64_t i = first; i < last; ++i) {
        if (to_float(x[i]) > levels.threshold) {
          p.packed.as<std::uint8_t>()[i / 8] |= std::uint8_t(1U << (i % 8));
        }
      }
    }
  });
}

void dequantize_binary_cpu(const BinaryParams& p) {
  dispatch_float(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (std::int64_t i = 0; i < p.x.size(0); ++i) {
      const bool bit = (p.packed.as<std::uint8_t>()[i / 8] >> (i % 8) & 1) != 0;
      const float scale = p.scale.as<float>()[i / kBlock];
      p.x.as<T>()[i] = from_float<T>(p.offset.as<float>()[i / kBlock] + (bit ? scale : -scale));
    }
  });
}

}  // namespace fastgpt::quant
