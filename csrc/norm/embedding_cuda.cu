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
struct EmbeddingArgs {
  const std::int64_t* ids;
  std::int64_t id_stride;
  const void* weight;
  DType weight_dtype;
  std::int64_t weight_stride;
  std::int64_t vocab_size;
  T* out;
  std::int64_t out_stride;
  unsigned runs;      // of kSize columns in a row
  unsigned num_runs;  // in all rows
};

// One thread copies kSize columns of one row; the rows' runs stand one after another over the grid,
// so that no thread idles at the end of a row. An id outside the table cannot raise from a kernel:
// its row becomes NaN, which no later step can hide.
template <class T, int kSize>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const __grid_constant__ device::Dependent<EmbeddingArgs<T>> dependent) {
  const EmbeddingArgs<T>& p = dependent.wait();
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= p.num_runs) return;
  const std::int64_t token = index / p.runs;
  const std::int64_t column = std::int64_t(index % p.runs) * kSize;
  const std::int64_t id = p.ids[token * p.id_stride];
  float values[kSize];
  if (id >= 0 && id < p.vocab_size) {
    device::load_as_float<kSize>(p.weight, p.weight_dtype, id * p.weight_stride + column, values);
  } else {
#pragma unroll
    for (int e = 0; e < kSize; ++e) values[e] = __int_as_float(0x7FC00000);
  }
  device::Pack<T, kSize> result;
#pragma unroll
  for (int e = 0; e < kSize; ++e) result.values[e] = device::from_float<T>(values[e]);
  device::store_pack(p.out + token * p.out_stride + column, result);
}

}  // namespace

void embedding_cuda(const EmbeddingParams& p, const Stream& stream) {
  const std::int64_t num_tokens = p.ids.size(0);
  const std::int64_t hidden = p.weight.size(1);
  if (num_tokens == 0 || hidden == 0) return;
  device::dispatch_float(p.out.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto run = [&](auto size_tag) {
      constexpr int kSize = decltype(size_tag)::value;
      const std::int64_t runs = hidden / kSize;
      FASTGPT_CHECK(num_tokens * runs < (std::int64_t(1) << 32) - kThreads, "ids has ", num_tokens,
                    " elements, too many for one launch; split them");
      const EmbeddingArgs<T> args{p.ids.as<std::int64_t>(),
                                  p.ids.stride(0),
                                  p.weight.data,
                                  p.weight.dtype,
                                  p.weight.stride(0),
                                  p.weight.size(0),
                                  p.out.as<T>(),
                                  p.out.stride(0),
                                  unsigned(runs),
                                  unsigned(num_tokens * runs)};
      const auto ctas = unsigned((num_tokens * runs + kThreads - 1) / kThreads);
      device::launch(embedding_kernel<T, kSize>, ctas, kThreads, 0,
                     static_cast<cudaStream_t>(stream.handle), args);
    };
    constexpr int kFull = device::kPackSize<T>;
    if (device::rows_aligned(p.weight, kFull) && device::rows_aligned(p.out, kFull)) {
      run(std::integral_constant<int, kFull>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace fastgpt::norm
