// Eight-bit rows on the CPU. int8 runs on codes; e4m3 has no units here, so its rows go back to
// float32 (code * scale) and through linear_cpu: the same meaning, at float32's speed.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "fastgpt/check.h"
#include "fastgpt/cpu_isa.h"
#include "fastgpt/dispatch.h"
#include "fastgpt/fp8.h"
#include "fastgpt/thread_pool.h"
#include "gemm/cpu_layout.h"
#include "gemm/eight_bit_kernels.h"
#include "gemm/eight_bit_panel.h"
#include "gemm/kernels.h"

namespace fastgpt::gemm {
namespace {

constexpr std::int64_t kRowsAtOnce = 96;  // whose codes stay in L2 while weights pass by

EightBitKernels kernels() {
  switch (cpu_isa()) {
    case CpuIsa::kPortable:
      return eight_bit_kernels_portable();
    case CpuIsa::kAVX2:
      return eight_bit_kernels_avx2();
    case CpuIsa::kAVX512:
      return eight_bit_kernels_avx512();
  }
  return eight_bit_kernels_portable();
}

template <class T>
void quantize_e4m3(const T* x, std::int64_t k, std::int64_t group, std::uint8_t* codes,
                   float* scale, std::int64_t stride) {
  std::fill(codes + k, codes + row_codes_width(k), std::uint8_t{0});
  for (std::int64_t begin = 0, g = 0; begin < k; begin += group, ++g) {
    const std::int64_t end = std::min(k, begin + group);
    float amax = 0.0F;
    bool finite = true;
    for (std::int64_t i = begin; i < end; ++i) {
      const float magnitude = std::fabs(to_float(x[i]));
      finite &= magnitude <= std::numeric_limits<float>::max();
      amax = std::max(amax, magnitude);
    }
    const float s =
        finite ? std::max(amax / kFp8Largest, 0x1p-100F) : std::numeric_limits<float>::quiet_NaN();
    scale[g * stride] = s;
    const float inverse = 1.0F / s;
    for (std::int64_t i = begin; i < end; ++i) {
      const float value = finite ? to_float(x[i]) * inverse : 0.0F;
      codes[i] = from_float<Fp8>(std::clamp(value, -kFp8Largest, kFp8Largest)).bits;
    }
  }
}

std::vector<float> floats(const TensorView& view) {
  std::vector<float> values(view ? std::size_t(view.numel()) : 0);
  if (!view) return values;
  dispatch_float(view.dtype, [&](auto tag) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = to_float(view.as<decltype(tag)>()[i]);
    }
  });
  return values;
}

void linear_int8(const EightBitLinearParams& p) {
  const std::int64_t num_rows = p.codes.size(0);
  const std::vector<float> bias = floats(p.bias);
  EightBitTask task{};
  task.codes = p.codes.as<std::int8_t>();
  task.codes_stride = p.codes.size(1);
  task.row_scale = p.scale.as<float>();
  task.weight = p.weight.packed.as<std::int8_t>();
  task.channel_scale = p.weight.scale.as<float>();
  task.bias = p.bias ? bias.data() : nullptr;
  task.n = p.out.size(1);
  task.steps = ceil_div(p.k, kStep);
  task.out_dtype = p.out.dtype;
  task.out_stride = p.out.stride(0);
  std::vector<std::int32_t> sums(std::size_t(num_rows), 0);
  for (std::int64_t r = 0; r < num_rows; ++r) {
    const std::int8_t* const row = task.codes + r * task.codes_stride;
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < task.codes_stride; ++i) sum += row[i];
    sums[std::size_t(r)] = sum;
  }
  const std::int64_t blocks = ceil_div(task.n, kBlockColumns);
  const std::int64_t row_chunks = ceil_div(num_rows, kRowsAtOnce);
  const auto multiply = kernels().multiply;
  parallel_for(0, blocks * row_chunks, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      EightBitTask t = task;
      const std::int64_t row = i / blocks * kRowsAtOnce;
      t.block_begin = i % blocks;
      t.block_end = t.block_begin + 1;
      t.num_rows = std::min(kRowsAtOnce, num_rows - row);
      t.codes += row * t.codes_stride;
      t.row_scale += row;
      t.row_sums = sums.data() + row;
      t.out = p.out.as<std::uint8_t>() + row * t.out_stride * dtype_bytes(t.out_dtype);
      multiply(t);
    }
  });
}

void linear_e4m3(const EightBitLinearParams& p) {
  const std::int64_t num_rows = p.codes.size(0);
  const std::int64_t group = p.scale.size(0) > 1 ? kRowGroup : p.k;
  std::vector<float> x(std::size_t(num_rows * p.k));
  parallel_for(0, num_rows, 8, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      const std::uint8_t* const codes = p.codes.as<std::uint8_t>() + r * p.codes.size(1);
      for (std::int64_t i = 0; i < p.k; ++i) {
        const float scale = p.scale.as<float>()[i / group * p.scale.size(1) + r];
        x[std::size_t(r * p.k + i)] = to_float(Fp8{codes[i]}) * scale;
      }
    }
  });
  LinearParams linear{{}, p.weight, p.bias, p.out};
  linear.x.data = x.data();
  linear.x.dtype = DType::kF32;
  linear.x.ndim = 2;
  linear.x.defined = true;
  linear.x.sizes = {num_rows, p.k};
  linear.x.strides = {p.k, 1};
  linear_cpu(linear);
}

}  // namespace

void quantize_rows_cpu(const QuantizeRowsParams& p) {
  const std::int64_t num_rows = p.x.size(0);
  const std::int64_t k = p.x.size(1);
  const std::int64_t group = p.scale.size(0) > 1 ? kRowGroup : row_codes_width(k);
  const std::int64_t stride = p.scale.size(1);
  auto* const scale = p.scale.as<float>();
  const auto quantize_int8 = kernels().quantize_int8;
  for (std::int64_t g = 0; g < p.scale.size(0); ++g) {
    std::fill(scale + g * stride + num_rows, scale + (g + 1) * stride, 0.0F);
  }
  parallel_for(0, num_rows, 1 + 32768 / k, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      const void* const x = p.x.as<std::uint8_t>() + r * p.x.stride(0) * dtype_bytes(p.x.dtype);
      std::uint8_t* const codes = p.codes.as<std::uint8_t>() + r * p.codes.size(1);
      if (p.codes.dtype == DType::kI8) {
        quantize_int8(
            {x, p.x.dtype, k, group, reinterpret_cast<std::int8_t*>(codes), scale + r, stride});
        continue;
      }
      dispatch_float(p.x.dtype, [&](auto tag) {
        quantize_e4m3(static_cast<const decltype(tag)*>(x), k, group, codes, scale + r, stride);
      });
    }
  });
}

void linear_eight_bit_cpu(const EightBitLinearParams& p) {
  p.weight.format == WeightFormat::kInt8 ? linear_int8(p) : linear_e4m3(p);
}

}  // namespace fastgpt::gemm
