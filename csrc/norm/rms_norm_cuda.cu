#include <cuda_runtime.h>

#include <algorithm>

#include "device/dependent.cuh"
#include "device/pack.cuh"
#include "device/reduce.cuh"
#include "device/types.cuh"
#include "fastgpt/check.h"
#include "norm/kernels.h"

namespace fastgpt::norm {
namespace {

constexpr int kCachedPacks = 2;  // packs of a row a thread keeps between its two uses

struct RowsView {
  std::int64_t stride0;
  std::int64_t stride1;
  __device__ std::int64_t offset(std::int64_t i, std::int64_t j) const {
    return i * stride0 + j * stride1;
  }
};

template <class T>
struct NormArgs {
  T* x;
  const void* addend;
  const void* weight;
  DType weight_dtype;
  void* out;
  DType out_dtype;
  unsigned num_rows;
  unsigned inner;
  int hidden;
  RowsView x_rows;
  RowsView addend_rows;
  RowsView out_rows;
  float eps;
};

// blockDim.x threads own one row; rows of up to 32 packs are stacked blockDim.y to a CTA, so that
// the norms of attention heads do not run as thousands of one-warp CTAs. A thread keeps its first
// packs in registers: rows up to 2 * blockDim.x packs are read once.
// Grid: ceil(num_rows / blockDim.y). With kAdd, x is the residual and is updated; the dtype of
// addend and out may differ from x's and is read at run time.
template <class T, int kSize, bool kAdd>
__global__ void __launch_bounds__(1024)
    rms_norm_kernel(const __grid_constant__ device::Dependent<NormArgs<T>> dependent) {
  using device::Pack;
  __shared__ float scratch[32];
  const NormArgs<T>& args = dependent.wait();
  const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
  // blockDim.y > 1 only with one warp a row: no barrier is missed
  if (row >= args.num_rows) return;
  const std::int64_t i = row / args.inner;
  const std::int64_t j = row % args.inner;
  T* const x = args.x + args.x_rows.offset(i, j);
  const std::int64_t out_start = args.out_rows.offset(i, j);
  const std::int64_t addend_start = args.addend_rows.offset(i, j);
  const int num_packs = args.hidden / kSize;

  Pack<T, kSize> cached[kCachedPacks];
  float sum = 0.0F;
  const auto accumulate = [&](Pack<T, kSize>& pack, int p) {
    if (kAdd) {
      float other[kSize];
      device::load_as_float<kSize>(args.addend, args.out_dtype, addend_start + p * kSize, other);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        pack.values[e] = device::from_float<T>(device::to_float(pack.values[e]) + other[e]);
      }
      device::store_pack(x + p * kSize, pack);
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float value = device::to_float(pack.values[e]);
      sum += value * value;
    }
  };
#pragma unroll
  for (int c = 0; c < kCachedPacks; ++c) {
    const int p = int(threadIdx.x + c * blockDim.x);
    if (p < num_packs) {
      cached[c] = device::load_pack<kSize>(x + p * kSize);
      accumulate(cached[c], p);
    }
  }
  const int first_uncached = int(threadIdx.x + kCachedPacks * blockDim.x);
  for (int p = first_uncached; p < num_packs; p += int(blockDim.x)) {
    auto pack = device::load_pack<kSize>(x + p * kSize);
    accumulate(pack, p);
  }
  sum = blockDim.x == 32 ? device::warp_sum(sum) : device::block_sum(sum, scratch);
  const float inv = rsqrtf(sum / float(args.hidden) + args.eps);

  const auto write = [&](const Pack<T, kSize>& pack, int p) {
    float gain[kSize];
    if (args.weight != nullptr) {
      device::load_as_float<kSize>(args.weight, args.weight_dtype, p * kSize, gain);
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) gain[e] = 1.0F;
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) gain[e] *= device::to_float(pack.values[e]) * inv;
    device::store_from_float<kSize>(args.out, args.out_dtype, out_start + p * kSize, gain);
  };
#pragma unroll
  for (int c = 0; c < kCachedPacks; ++c) {
    const int p = int(threadIdx.x + c * blockDim.x);
    if (p < num_packs) write(cached[c], p);
  }
  for (int p = first_uncached; p < num_packs; p += int(blockDim.x)) {
    write(device::load_pack<kSize>(x + p * kSize), p);
  }
}

RowsView rows_of(const TensorView& view) {
  return {view.stride(0), view.ndim == 3 ? view.stride(1) : 0};
}

// addend absent: plain norm of x.
void launch(const TensorView& x, const TensorView& addend, const TensorView& weight,
            const TensorView& out, float eps, const Stream& stream) {
  const std::int64_t inner = x.ndim == 3 ? x.size(1) : 1;
  const std::int64_t num_rows = x.size(0) * inner;
  const std::int64_t hidden = x.size(-1);
  FASTGPT_CHECK(num_rows < (std::int64_t(1) << 31) && hidden < (std::int64_t(1) << 31), "x has ",
                num_rows, " rows of ", hidden, "; expected fewer than 2^31 of each");
  device::dispatch_float(x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](auto size_tag) {
      constexpr int kSize = decltype(size_tag)::value;
      const std::int64_t packs = (hidden + kSize - 1) / kSize;
      const unsigned width = unsigned(std::min<std::int64_t>(1024, (packs + 31) / 32 * 32));
      const unsigned height =
          width > 32
              ? 1
              : unsigned(std::clamp<std::int64_t>(num_rows / 264, 1, 8));  // fill the SMs first
      const unsigned grid = unsigned((num_rows + height - 1) / height);
      const auto kernel =
          addend ? rms_norm_kernel<T, kSize, true> : rms_norm_kernel<T, kSize, false>;
      const NormArgs<T> args{x.as<T>(),
                             addend.data,
                             weight.data,
                             weight.dtype,
                             out.data,
                             out.dtype,
                             unsigned(num_rows),
                             unsigned(inner),
                             int(hidden),
                             rows_of(x),
                             addend ? rows_of(addend) : RowsView{},
                             rows_of(out),
                             eps};
      device::launch(kernel, grid, dim3(width, height), 0, static_cast<cudaStream_t>(stream.handle),
                     args);
    };
    constexpr int kFull = device::kPackSize<T>;
    if (device::rows_aligned(x, kFull) && device::rows_aligned(addend, kFull) &&
        device::rows_aligned(weight, kFull) && device::rows_aligned(out, kFull)) {
      run(std::integral_constant<int, kFull>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

void rms_norm_cuda(const RmsNormParams& p, const Stream& stream) {
  launch(p.x, TensorView{}, p.weight, p.out, p.eps, stream);
}

void add_rms_norm_cuda(const AddRmsNormParams& p, const Stream& stream) {
  launch(p.residual, p.x, p.weight, p.out, p.eps, stream);
}

}  // namespace fastgpt::norm
