#include <cuda_runtime.h>

#include "fastgpt/check.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

constexpr int kRows = 32;  // of the weight, one a lane
constexpr int kWarps = 8;  // share out the columns that an error spreads to

struct Args {
  const float* left;
  const float* scale;
  const float* zero;
  const float* spread;
  std::uint8_t* codes;
  float* errors;
  std::int64_t rows;
  std::int64_t left_stride, scale_stride, zero_stride, spread_stride, codes_stride, errors_stride;
  int cols;
  float top;
};

// One CTA owns 32 rows of the weight, a lane each, and takes the columns of the block one after
// another: every warp computes a column's error anew, which is cheaper than a second barrier, and
// spreads it to the columns that are its own (j % 8). The same in operations of torch is eight
// launches a column, a thousand a block.
__global__ void __launch_bounds__(kRows* kWarps) gptq_round_kernel(const __grid_constant__ Args p) {
  __shared__ float work[kMaxGptqCols][kRows];
  static_assert(sizeof(work) <= 48 * 1024);
  const int lane = int(threadIdx.x), warp = int(threadIdx.y);
  const std::int64_t row = std::int64_t(blockIdx.x) * kRows + lane;
  const bool is_row = row < p.rows;
  for (int i = warp; i < p.cols; i += kWarps)
    work[i][lane] = is_row ? p.left[i * p.left_stride + row] : 0.0F;
  __syncthreads();
  for (int i = 0; i < p.cols; ++i) {
    const float* factor = p.spread + i * p.spread_stride;
    const float scale = is_row ? p.scale[i * p.scale_stride + row] : 1.0F;
    const float zero = is_row ? p.zero[i * p.zero_stride + row] : 0.0F;
    const float value = work[i][lane];
    const float code = fminf(fmaxf(rintf(value / scale) + zero, 0.0F), p.top);
    const float error = (value - (code - zero) * scale) / factor[i];
    if (warp == 0 && is_row) {
      p.codes[i * p.codes_stride + row] = std::uint8_t(code);
      p.errors[i * p.errors_stride + row] = error;
    }
    // The first column behind i that belongs to this warp.
    for (int j = i + 1 + (warp - (i + 1) % kWarps + kWarps) % kWarps; j < p.cols; j += kWarps)
      work[j][lane] -= error * factor[j];
    __syncthreads();
  }
}

}  // namespace

void gptq_round_cuda(const GptqParams& p, const Stream& stream) {
  const std::int64_t rows = p.left.size(1);
  const Args args{p.left.as<float>(),
                  p.scale.as<float>(),
                  p.zero.as<float>(),
                  p.spread.as<float>(),
                  p.codes.as<std::uint8_t>(),
                  p.errors.as<float>(),
                  rows,
                  p.left.stride(0),
                  p.scale.stride(0),
                  p.zero.stride(0),
                  p.spread.stride(0),
                  p.codes.stride(0),
                  p.errors.stride(0),
                  int(p.left.size(0)),
                  float(p.top)};
  gptq_round_kernel<<<unsigned((rows + kRows - 1) / kRows), dim3(kRows, kWarps), 0,
                      static_cast<cudaStream_t>(stream.handle)>>>(args);
  FASTGPT_CUDA_TRY(cudaGetLastError());
}

}  // namespace fastgpt::quant
