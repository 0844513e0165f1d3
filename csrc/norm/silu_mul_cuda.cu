#include <cuda_runtime.h>

#include "device/dependent.cuh"
#include "device/pack.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"
#include "norm/kernels.h"

namespace fastgpt::norm {
namespace {

constexpr int kThreads = 128;

template <class T>
struct SiluMulArgs {
  const T* x;
  std::int64_t x_stride;
  T* out;
  std::int64_t out_stride;
  std::int64_t width;
  unsigned chunks;
};

// One thread computes kSize columns of one row: two loads, one store.
// Grid: num_rows * chunks CTAs, chunks = ceil(width / (kSize * kThreads)), a row's side by side.
template <class T, int kSize>
__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const __grid_constant__ device::Dependent<SiluMulArgs<T>> dependent) {
  const SiluMulArgs<T>& p = dependent.wait();
  const std::int64_t row = blockIdx.x / p.chunks;
  const std::int64_t column =
      (std::int64_t(blockIdx.x % p.chunks) * kThreads + threadIdx.x) * kSize;
  if (column >= p.width) return;
  const auto gate = device::load_pack<kSize>(p.x + row * p.x_stride + column);
  const auto up = device::load_pack<kSize>(p.x + row * p.x_stride + p.width + column);
  device::Pack<T, kSize> result;
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    const float g = device::to_float(gate.values[e]);
    result.values[e] =
        device::from_float<T>(g / (1.0F + expf(-g)) * device::to_float(up.values[e]));
  }
  device::store_pack(p.out + row * p.out_stride + column, result);
}

}  // namespace

void silu_mul_cuda(const SiluMulParams& p, const Stream& stream) {
  const std::int64_t num_rows = p.x.size(0);
  const std::int64_t width = p.out.size(1);
  if (num_rows == 0 || width == 0) return;
  device::dispatch_float(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](auto size_tag) {
      constexpr int kSize = decltype(size_tag)::value;
      const std::int64_t chunks = (width + kSize * kThreads - 1) / (kSize * kThreads);
      FASTGPT_CHECK(num_rows * chunks < (std::int64_t(1) << 31), "x has ", num_rows, " rows of ",
                    2 * width, ", too many for one launch; split the rows");
      const SiluMulArgs<T> args{p.x.as<T>(),     p.x.stride(0), p.out.as<T>(),
                                p.out.stride(0), width,         unsigned(chunks)};
      device::launch(silu_mul_kernel<T, kSize>, unsigned(num_rows * chunks), kThreads, 0,
                     static_cast<cudaStream_t>(stream.handle), args);
    };
    constexpr int kFull = device::kPackSize<T>;
    // The row of x holds gate and up, so up is aligned only if out's width is whole packs.
    if (device::rows_aligned(p.x, kFull) && device::rows_aligned(p.out, kFull)) {
      run(std::integral_constant<int, kFull>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace fastgpt::norm
