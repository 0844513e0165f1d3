#include <algorithm>
#include <cmath>

#include "fastgpt/dispatch.h"
#include "fastgpt/thread_pool.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

/// amax / steps in float16: 1 for a group of zeros, never 0, never infinite.
std::uint16_t int4_scale(float amax, float steps, std::int64_t row, std::int64_t group) {
  if (amax == 0.0F) return from_float<Half>(1.0F).bits;
  const std::uint16_t bits = from_float<Half>(amax / steps).bits;
  FASTGPT_CHECK(bits < 0x7C00U, "row ", row, ", group ", group, " of x reaches ", amax,
                ", which needs a scale above float16's range; choose fp8 or bf16 for it");
  return std::max<std::uint16_t>(bits, 1);
}

template <class T>
void quantize_row(const Int4Params& p, std::int64_t row) {
  const std::int64_t cols = p.x.size(1);
  const std::int64_t groups = p.scale.size(1);
  const std::int64_t row_bytes = p.packed.size(1);
  const T* x = p.x.as<T>() + row * p.x.stride(0);
  std::uint8_t* packed = p.packed.as<std::uint8_t>() + row * row_bytes;
  int zero = 8;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t first = g * p.group_size;
    const std::int64_t last = std::min(cols, first + p.group_size);
    float low = 0.0F;
    float high = 0.0F;
    for (std::int64_t c = first; c < last; ++c) {
      const float value = to_float(x[c]);
      FASTGPT_CHECK(std::isfinite(value), "x[", row, ", ", c, "] is ", value,
                    "; only finite values can be quantized");
      low = std::min(low, value);
      high = std::max(high, value);
    }
    const std::uint16_t bits = p.zero_point ? int4_scale(high - low, 15.0F, row, g)
                                            : int4_scale(std::max(high, -low), 7.0F, row, g);
    const float scale = to_float(Half{bits});
    p.scale.as<std::uint16_t>()[row * groups + g] = bits;
    if (p.zero_point) {
      zero = int(std::clamp(std::nearbyint(-low / scale), 0.0F, 15.0F));
      p.zero_point.as<std::uint8_t>()[row * groups + g] = std::uint8_t(zero);
    }
    const float lowest = p.zero_point ? float(-zero) : -7.0F;
    const float highest = p.zero_point ? float(15 - zero) : 7.0F;
    for (std::int64_t c = first; c < last; ++c) {  // first is even: a byte's low half comes first
      const float rounded = std::nearbyint(to_float(x[c]) / scale);
      const int code = int(std::clamp(rounded, lowest, highest)) + zero;
      packed[c / 2] = std::uint8_t(c % 2 == 0 ? code : packed[c / 2] | code << 4);
    }
  }
  if (cols % 2 != 0) packed[cols / 2] = std::uint8_t(packed[cols / 2] | zero << 4);
  for (std::int64_t b = (cols + 1) / 2; b < row_bytes; ++b) packed[b] = std::uint8_t(zero * 17);
}

}  // namespace

void quantize_int4_cpu(const Int4Params& p) {
  dispatch_float(p.x.dtype, [&](auto tag) {
    parallel_for(0, p.x.size(0), 1 + 8192 / p.x.size(1),
                 [&](std::int64_t first, std::int64_t last) {
                   for (std::int64_t row = first; row < last; ++row) {
                     quantize_row<decltype(tag)>(p, row);
                   }
                 });
  });
}

void dequantize_int4_cpu(const Int4Params& p) {
  const std::int64_t cols = p.x.size(1);
  const std::int64_t groups = p.scale.size(1);
  dispatch_float(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(0, p.x.size(0), 1 + 16384 / cols, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; ++row) {
        const std::uint8_t* packed = p.packed.as<std::uint8_t>() + row * p.packed.size(1);
        T* x = p.x.as<T>() + row * p.x.stride(0);
        for (std::int64_t g = 0; g < groups; ++g) {
          const float scale = to_float(Half{p.scale.as<std::uint16_t>()[row * groups + g]});
          const int zero = p.zero_point ? p.zero_point.as<std::uint8_t>()[row * groups + g] : 8;
          const std::int64_t end = std::min(cols, (g + 1) * p.group_size);
          for (std::int64_t c = g * p.group_size; c < end; ++c) {
            const int code = c % 2 == 0 ? packed[c / 2] & 0xF : packed[c / 2] >> 4;
            x[c] = from_float<T>(float(code - zero) * scale);
          }
        }
      }
    });
  });
}

}  // namespace fastgpt::quant
