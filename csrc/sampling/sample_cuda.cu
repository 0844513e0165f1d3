#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "device/dependent.cuh"
#include "device/launch.cuh"
#include "device/order.cuh"
#include "fastgpt/check.h"
#include "sampling/draw.h"
#include "sampling/kernels.h"

namespace fastgpt::sampling {
namespace {

constexpr int kThreads = 1024;
constexpr int kClusterSize = 8;       // CTAs that share one row, the portable maximum
constexpr int kClusterVocab = 16384;  // smaller rows are read faster than a cluster meets
constexpr int kDigitBits = 3;
constexpr int kDigits = 1 << kDigitBits;

struct SampleArgs {
  const float* logits;
  std::int64_t logits_stride;
  int vocab_size;
  const float* temperature;
  const std::int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const std::int64_t* seeds;
  const std::int64_t* positions;
  std::int64_t* ids;
  int slice;        // values of a row that one CTA owns, a multiple of four
  bool is_cached;   // they fit its shared memory
  bool is_aligned;  // rows are whole 16-byte runs
};

/// What the CTAs of a row tell each other. Two sets, used in turn: a set is rewritten only after
/// a meeting that follows its last remote read.
struct Exchange {
  std::uint64_t values[2][kDigits];
  std::uint64_t totals[kDigits];
  std::uint64_t warps[kThreads / 32][kDigits];
};

// Meetings of the CTAs of one row; one CTA alone meets itself.
template <bool kClustered>
struct Row {
  Exchange* shared;
  int parity = 0;

  __device__ int rank() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kClustered) return int(cooperative_groups::this_cluster().block_rank());
#endif
    return 0;
  }
  __device__ static constexpr int size() { return kClustered ? kClusterSize : 1; }
  __device__ void meet() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kClustered) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
  __device__ std::uint64_t read(int from, int index) const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kClustered) {
      return *cooperative_groups::this_cluster().map_shared_rank(&shared->values[parity][index],
                                                                 from);
    }
#endif
    return shared->values[parity][index];
  }

  /// Largest value of all threads of the row.
  __device__ std::uint64_t largest(std::uint64_t value) {
    value = device::warp_max(value);
    if (threadIdx.x % 32 == 0) shared->warps[threadIdx.x / 32][0] = value;
    __syncthreads();
    if (threadIdx.x < 32) {
      value = device::warp_max(shared->warps[threadIdx.x][0]);
      if (threadIdx.x == 0) shared->values[parity][0] = value;
    }
    meet();
    value = 0;
    for (int r = 0; r < size(); ++r) value = max(value, read(r, 0));
    parity ^= 1;
    return value;
  }

  /// Sums over all threads of the row, left in shared->totals for every thread to read.
  __device__ void sum(std::uint64_t (&value)[kDigits]) {
#pragma unroll
    for (int d = 0; d < kDigits; ++d) {
      for (int offset = 16; offset > 0; offset /= 2) {
        value[d] += __shfl_xor_sync(~0U, value[d], offset);
      }
      if (threadIdx.x % 32 == 0) shared->warps[threadIdx.x / 32][d] = value[d];
    }
    __syncthreads();
    if (threadIdx.x < kDigits) {
      std::uint64_t total = 0;
      for (int w = 0; w < kThreads / 32; ++w) total += shared->warps[w][threadIdx.x];
      shared->values[parity][threadIdx.x] = total;
    }
    meet();
    if (threadIdx.x < kDigits) {
      std::uint64_t total = 0;
      for (int r = 0; r < size(); ++r) total += read(r, int(threadIdx.x));
      shared->totals[threadIdx.x] = total;
    }
    __syncthreads();
    parity ^= 1;
  }
};

__device__ float value_of_key(std::uint32_t key) {
  return __uint_as_float(key & 0x80000000U ? key & 0x7FFFFFFFU : ~key);
}

/// The largest key whose elements and those above it weigh `target` or more. weigh(v) is asked
/// only for elements that still can be it: three bits of the key are settled per pass.
/// Rejected: histograms in shared memory; logits share their exponents, so the atomics collide.
template <class RowType, class Weigh>
__device__ std::uint32_t select_key(RowType& row, const float* values, int count,
                                    std::uint64_t target, const Weigh& weigh) {
  std::uint32_t prefix = 0;
  int bits_left = 32;
  while (bits_left > 0) {
    const int bits = min(kDigitBits, bits_left);
    const int shift = bits_left - bits;
    std::uint64_t weight[kDigits] = {};
    for (int i = int(threadIdx.x); i < count; i += kThreads) {
      const float value = values[i];
      const std::uint32_t key = device::ordered_bits(value == value ? value : -INFINITY);
      if (bits_left < 32 && (key >> bits_left) != prefix) continue;
      const std::uint32_t digit = (key >> shift) & ((1U << bits) - 1);
      const std::uint64_t w = weigh(value);
#pragma unroll
      for (int d = 0; d < kDigits; ++d) weight[d] += digit == d ? w : 0;
    }
    row.sum(weight);
    int digit = (1 << bits) - 1;
    for (; digit > 0 && row.shared->totals[digit] < target; --digit) {
      target -= row.shared->totals[digit];
    }
    prefix = (prefix << bits) | std::uint32_t(digit);
    bits_left = shift;
    __syncthreads();  // totals are read before the next pass writes them
  }
  return prefix;
}

// One cluster of eight CTAs (or one CTA, before sm_90 and for a small vocabulary) draws the token
// of one row. Each CTA keeps its eighth of the row in shared memory, so the row leaves device
// memory once however many passes the settings need. All sums are of integers: the result does not
// depend on this division and equals the CPU's bit for bit. Grid: num_rows * cluster size.
template <bool kClustered>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const __grid_constant__ device::Dependent<SampleArgs> dependent) {
#if __CUDA_ARCH__ < 900
  if constexpr (kClustered) {
    return;  // the launcher never asks for it
  } else
#endif
  {
    extern __shared__ __align__(16) float cache[];
    const SampleArgs& args = dependent.wait();
    __shared__ Exchange exchange;
    Row<kClustered> row{&exchange};
    const std::int64_t r = blockIdx.x / row.size();
    const int slice = args.slice;
    const int first = min(row.rank() * slice, args.vocab_size);
    const int count = min(slice, args.vocab_size - first);
    const float* source = args.logits + r * args.logits_stride + first;

    // A thread meets ids in rising order, so the first of its largest values is the one it keeps.
    float own_largest = -INFINITY;
    int own_first = 0;
    if (args.is_aligned) {
      for (int i = int(threadIdx.x) * 4; i < count; i += kThreads * 4) {
        const float4 quad = *reinterpret_cast<const float4*>(source + i);
        if (args.is_cached) *reinterpret_cast<float4*>(cache + i) = quad;
        const float of_quad[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (of_quad[j] > own_largest) own_largest = of_quad[j], own_first = i + j;
        }
      }
    } else {
#pragma unroll 4
      for (int i = int(threadIdx.x); i < count; i += kThreads) {
        const float value = source[i];
        if (args.is_cached) cache[i] = value;
        if (value > own_largest) own_largest = value, own_first = i;
      }
    }
    std::uint64_t best = device::order_key(-INFINITY, 0);  // id 0 if nothing is larger
    if (own_largest > -INFINITY) {
      best = device::order_key(own_largest, std::uint32_t(first + own_first));
    }
    const float* values = args.is_cached ? cache : source;
    best = row.largest(best);  // also makes the cache visible
    const float largest = value_of_key(std::uint32_t(best >> 32));
    const std::int64_t best_id = device::key_index(best);
    const float temperature = args.temperature[r];
    if (!(temperature > 0.0F) || isinf(largest)) {
      if (row.rank() == 0 && threadIdx.x == 0) args.ids[r] = best_id;
      row.meet();  // nobody leaves while its shared memory may be read
      return;
    }

    const float factor = exponent_factor(temperature);
    float top_p = args.top_p[r];
    top_p = top_p > 0.0F ? fminf(top_p, 1.0F) : 0.0F;
    float min_p = args.min_p[r];
    min_p = min_p > 0.0F ? fminf(min_p, 1.0F) : 0.0F;
    const int top_k = args.top_k[r];
    float threshold = -INFINITY;
    if (top_k > 0 && top_k < args.vocab_size) {
      threshold = value_of_key(select_key(row, values, count, std::uint64_t(top_k),
                                          [](float) { return std::uint64_t(1); }));
    }
    const auto weigh = [&](float value) -> std::uint64_t {
      return value >= threshold ? token_weight(exp2_of((value - largest) * factor)) : 0;
    };
    if (top_p < 1.0F) {
      std::uint64_t weight[kDigits] = {};
      for (int i = int(threadIdx.x); i < count; i += kThreads) weight[0] += weigh(values[i]);
      row.sum(weight);
      const std::uint64_t target = top_p_target(exchange.totals[0], top_p);
      __syncthreads();
      threshold = value_of_key(select_key(row, values, count, target, weigh));
    }

    // The draw: a thread owns a contiguous run, so that ids are passed in order.
    const auto kept_weight = [&](float value) -> std::uint64_t {
      if (!(value >= threshold)) return 0;
      const float e = exp2_of((value - largest) * factor);
      return min_p > 0.0F && !(e >= min_p) ? 0 : token_weight(e);
    };
    const int run = (count + kThreads - 1) / kThreads;
    const int run_first = min(int(threadIdx.x) * run, count);
    const int run_last = min(run_first + run, count);
    std::uint64_t own = 0;
    for (int i = run_first; i < run_last; ++i) own += kept_weight(values[i]);
    std::uint64_t before = own;  // inclusive over the warp, then exclusive over the row
    const int lane = int(threadIdx.x % 32);
    const int warp = int(threadIdx.x / 32);
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint64_t other = __shfl_up_sync(~0U, before, offset);
      if (lane >= offset) before += other;
    }
    if (lane == 31) exchange.warps[warp][0] = before;
    before -= own;
    __syncthreads();
    std::uint64_t cta_total = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w == warp) before += cta_total;
      cta_total += exchange.warps[w][0];
    }
    if (threadIdx.x == 0) exchange.values[row.parity][0] = cta_total;
    row.meet();
    std::uint64_t total = 0;
    for (int other = 0; other < row.size(); ++other) {
      if (other == row.rank()) before += total;
      total += row.read(other, 0);
    }
    const std::uint64_t target = multiply_high(
        random_bits(std::uint64_t(args.seeds[r]), std::uint64_t(args.positions[r])), total);
    if (before <= target && target < before + own) {
      int i = run_first;
      for (std::uint64_t reached = before + kept_weight(values[i]); reached <= target;) {
        reached += kept_weight(values[++i]);
      }
      args.ids[r] = first + i;
    }
    row.meet();  // nobody leaves while its shared memory may be read
  }
}

template <bool kClustered>
void launch(SampleArgs args, std::int64_t num_rows, const Stream& stream) {
  const int ctas = kClustered ? kClusterSize : 1;
  args.slice = ((args.vocab_size + ctas - 1) / ctas + 3) / 4 * 4;
  args.is_aligned = reinterpret_cast<std::uintptr_t>(args.logits) % 16 == 0 &&
                    args.logits_stride % 4 == 0 && args.vocab_size % 4 == 0;
  int limit = 0;
  FASTGPT_CUDA_TRY(
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device));
  const int available = limit - int(sizeof(Exchange)) - 1024;
  args.is_cached = args.slice <= available / 4;
  device::allow_shared_bytes<sample_kernel<kClustered>>(available / 4 * 4, stream.device);
  const std::size_t shared_bytes = args.is_cached ? std::size_t(args.slice) * 4 : 0;
  device::launch(sample_kernel<kClustered>, unsigned(num_rows * ctas), kThreads, shared_bytes,
                 static_cast<cudaStream_t>(stream.handle), args, unsigned(ctas));
}

}  // namespace

void sample_cuda(const SampleParams& p, const Stream& stream) {
  SampleArgs args{
      p.logits.as<float>(),      p.logits.stride(0),         int(p.logits.size(1)),
      p.temperature.as<float>(), p.top_k.as<std::int32_t>(), p.top_p.as<float>(),
      p.min_p.as<float>(),       p.seeds.as<std::int64_t>(), p.positions.as<std::int64_t>(),
      p.ids.as<std::int64_t>()};
  const bool clustered = args.vocab_size > kClusterVocab &&
                         device::compiled_arch<sample_kernel<true>>(stream.device) >= 90;
  if (clustered) return launch<true>(args, p.logits.size(0), stream);
  launch<false>(args, p.logits.size(0), stream);
}

}  // namespace fastgpt::sampling
