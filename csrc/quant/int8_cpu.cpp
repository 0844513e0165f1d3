#include <algorithm>
#include <cmath>

#include "fastgpt/dispatch.h"
#include "fastgpt/fp8.h"
#include "fastgpt/thread_pool.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

template <class T>
void quantize_row(const Int8Params& p, std::int64_t row) {
  const std::int64_t cols = p.x.size(1);
  const T* x = p.x.as<T>() + row * p.x.stride(0);
  float amax = 0.0F;
  for (std::int64_t c = 0; c < cols; ++c) {
    const float magnitude = std::fabs(to_float(x[c]));
    FASTGPT_CHECK(magnitude <= std::numeric_limits<float>::max(), "x[", row, ", ", c, "] is ",
                  to_float(x[c]), "; only finite values can be quantized");
    amax = std::max(amax, magnitude);
  }
  float scale = amax / kInt8Largest;
  if (!(scale > 0.0F)) scale = 1.0F;
  p.scale.as<float>()[row] = scale;
  std::int8_t* packed = p.packed.as<std::int8_t>() + row * cols;
  for (std::int64_t c = 0; c < cols; ++c) {
    const float rounded = std::nearbyint(to_float(x[c]) / scale);
    packed[c] = std::int8_t(std::clamp(rounded, -kInt8Largest, kInt8Largest));
  }
}

}  // namespace

void quantize_int8_cpu(const Int8Params& p) {
  dispatch_float(p.x.dtype, [&](auto tag) {
    parallel_for(0, p.x.size(0), 1 + 8192 / p.x.size(1),
                 [&](std::int64_t first, std::int64_t last) {
                   for (std::int64_t row = first; row < last; ++row) {
                     quantize_row<decltype(tag)>(p, row);
                   }
                 });
  });
}

void dequantize_int8_cpu(const Int8Params& p) {
  const std::int64_t cols = p.x.size(1);
  dispatch_float(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(0, p.x.size(0), 1 + 16384 / cols, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; ++row) {
        const float scale = p.scale.as<float>()[row];
        const std::int8_t* packed = p.packed.as<std::int8_t>() + row * cols;
        T* x = p.x.as<T>() + row * p.x.stride(0);
        for (std::int64_t c = 0; c < cols; ++c) x[c] = from_float<T>(float(packed[c]) * scale);
      }
    });
  });
}

}  // namespace fastgpt::quant
