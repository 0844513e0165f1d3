// Takes a buffer from the pool and dequantizes one int4 row into it.
#include <cstdio>
#include <memory>

#include "fastgpt/layer_cache.h"
#include "fastgpt/quant.h"

namespace {

fastgpt::TensorView row(void* data, fastgpt::DType dtype, std::int64_t cols) {
  fastgpt::TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.ndim = 2;
  view.defined = true;
  view.sizes = {1, cols};
  view.strides = {cols, 1};
  return view;
}

}  // namespace

int main() {
  auto pool = std::make_shared<fastgpt::LayerCache>(
      std::make_unique<fastgpt::Arena>(fastgpt::make_host_upstream(), std::size_t{8} << 20));
  const auto lease =
      pool->allocate(32 * sizeof(float), "row", "float32 32", fastgpt::Contents::kZero, nullptr);
  std::uint8_t packed[16];
  for (int i = 0; i < 16; ++i) packed[i] = std::uint8_t(((15 - i) << 4) | i);
  std::uint16_t scale = 0x3800;  // 0.5 in float16
  fastgpt::quant::Int4Params params{row(lease->data(), fastgpt::DType::kF32, 32),
                                    row(packed, fastgpt::DType::kU8, 16),
                                    row(&scale, fastgpt::DType::kF16, 1),
                                    {},
                                    32};
  fastgpt::quant::dequantize_int4(params, fastgpt::Stream{});
  const auto* x = static_cast<const float*>(lease->data());
  for (int i = 0; i < 16; ++i) {
    if (x[2 * i] != 0.5F * float(i - 8) || x[2 * i + 1] != 0.5F * float(7 - i)) {
      std::printf("column %d is %g | %g\n", 2 * i, double(x[2 * i]), double(x[2 * i + 1]));
      return 1;
    }
  }
  std::printf("pool holds %zu bytes, the row is right\n", pool->arena().stats().requested_bytes);
  return 0;
}
