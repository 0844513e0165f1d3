#include <cuda_fp8.h>

#include <algorithm>

#include "device/dependent.cuh"
#include "device/reduce.cuh"
#include "device/vec.cuh"
#include "gemm/eight_bit_kernels.h"

namespace fastgpt::gemm {
namespace {

constexpr int kMostThreads = 256;
constexpr int kChunk = 16;  // codes that a thread writes together

struct QuantizeRowsArgs {
  const void* x;
  std::uint8_t* codes;
  float* scale;
  std::int64_t num_rows;
  std::int64_t k;
  std::int64_t x_stride;
  std::int64_t width;         // of codes
  std::int64_t scale_stride;  // between groups
  bool x_aligned;
};

/// The 16 values of one chunk as they lie in x. An operand of the products lies in memory as
/// layout.cuh says of the weight: chunk t of 64 columns holds columns 8 t .. + 7 and 32 + 8 t ..
/// + 7, zero behind k.
template <class T>
class Chunk {
 public:
  __device__ void load(const QuantizeRowsArgs& p, const T* row, std::int64_t chunk) {
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const std::int64_t column = chunk / 4 * 64 + slot * 32 + chunk % 4 * 8;
      if constexpr (sizeof(T) == 2) {
        words_[slot] = device::load_8(row, column, p.k, p.x_aligned);
      } else {
        auto* const to = reinterpret_cast<float*>(words_ + 2 * slot);
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = column + i < p.k ? row[column + i] : 0.0F;
      }
    }
  }
  __device__ float value(int i) const {
    return device::to_float(reinterpret_cast<const T*>(words_)[i]);
  }

 private:
  uint4 words_[sizeof(T)];
};

/// Largest magnitude; infinity where a value is NaN, too.
template <class T>
__device__ float largest(const Chunk<T>& values) {
  float amax = 0.0F;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float magnitude = fabsf(values.value(i));
    amax = fmaxf(amax, magnitude);
    finite &= magnitude <= 3.402823466e38F;
  }
  return finite ? amax : __int_as_float(0x7F800000);
}

template <bool kInt8>
__device__ float scale_of(float amax) {
  if (amax > 3.402823466e38F) return __int_as_float(0x7FC00000);
  return fmaxf(__fdiv_rn(amax, kInt8 ? 127.0F : 448.0F), 0x1p-100F);
}

/// Codes of a chunk in the weight's order of bytes: columns 0 2 1 3 of every four.
template <bool kInt8, class T>
__device__ uint4 encode(const Chunk<T>& values, float scale) {
  const float inverse = __frcp_rn(scale);
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = __fmul_rn(values.value(4 * w + i), inverse);
    if constexpr (kInt8) {
      // The low byte of 1.5 2^23 + v is v rounded to nearest even; |v| < 127.5.
      std::uint32_t b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = __float_as_uint(__fadd_rn(v[i], 12582912.0F));
      words[w] =
          __byte_perm(__byte_perm(b[0], b[2], 0x0040), __byte_perm(b[1], b[3], 0x0040), 0x5410);
    } else {
      const auto low = __nv_cvt_float2_to_fp8x2({v[0], v[2]}, __NV_SATFINITE, __NV_E4M3);
      const auto high = __nv_cvt_float2_to_fp8x2({v[1], v[3]}, __NV_SATFINITE, __NV_E4M3);
      words[w] = std::uint32_t(low) | std::uint32_t(high) << 16;
    }
  }
  const bool is_number = scale == scale;
  return is_number ? make_uint4(words[0], words[1], words[2], words[3]) : make_uint4(0, 0, 0, 0);
}

/// The scales behind the last row, which products copy with the others.
__device__ void pad_scales(const QuantizeRowsArgs& p, std::int64_t row, std::int64_t group) {
  if (row != p.num_rows - 1) return;
  for (std::int64_t i = p.num_rows; i < p.scale_stride; ++i) {
    p.scale[group * p.scale_stride + i] = 0.0F;
  }
}

// One CTA owns a row. Its threads keep what they have read, up to 20,480 values of 16 bits; what is
// behind is read twice, the second time from cache.
template <class T, bool kInt8>
__global__ void __launch_bounds__(kMostThreads)
    quantize_rows_kernel(const __grid_constant__ device::Dependent<QuantizeRowsArgs> dependent) {
  constexpr int kKept = sizeof(T) == 2 ? 5 : 2;
  __shared__ float scratch[32];
  const QuantizeRowsArgs& p = dependent.wait();
  const std::int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const std::int64_t chunks = p.width / kChunk;
  const std::int64_t behind = threadIdx.x + kKept * std::int64_t(blockDim.x);
  Chunk<T> kept[kKept], other;
  float amax = 0.0F;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const std::int64_t chunk = threadIdx.x + std::int64_t(i) * blockDim.x;
    if (chunk < chunks) kept[i].load(p, x, chunk);
  }
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const std::int64_t chunk = threadIdx.x + std::int64_t(i) * blockDim.x;
    if (chunk < chunks) amax = fmaxf(amax, largest(kept[i]));
  }
  for (std::int64_t chunk = behind; chunk < chunks; chunk += blockDim.x) {
    other.load(p, x, chunk);
    amax = fmaxf(amax, largest(other));
  }
  const float scale = scale_of<kInt8>(device::block_max(amax, scratch));
  if (threadIdx.x == 0) {
    p.scale[row] = scale;
    pad_scales(p, row, 0);
  }
  auto* codes = reinterpret_cast<uint4*>(p.codes + row * p.width);
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const std::int64_t chunk = threadIdx.x + std::int64_t(i) * blockDim.x;
    if (chunk < chunks) codes[chunk] = encode<kInt8>(kept[i], scale);
  }
  for (std::int64_t chunk = behind; chunk < chunks; chunk += blockDim.x) {
    other.load(p, x, chunk);
    codes[chunk] = encode<kInt8>(other, scale);
  }
}

// Eight lanes own 128 columns of a row. Grid-stride over all of them.
template <class T, bool kInt8>
__global__ void __launch_bounds__(kMostThreads)
    quantize_groups_kernel(const __grid_constant__ device::Dependent<QuantizeRowsArgs> dependent) {
  const QuantizeRowsArgs& p = dependent.wait();
  const std::int64_t chunks = p.width / kChunk;
  // Whole warps step together, so that all lanes take part in the exchange.
  const std::int64_t total = p.num_rows * chunks;
  const std::int64_t step = std::int64_t(gridDim.x) * kMostThreads;
  for (std::int64_t base = std::int64_t(blockIdx.x) * kMostThreads + threadIdx.x / 32 * 32;
       base < total; base += step) {
    const std::int64_t i = min(base + threadIdx.x % 32, total - 1);
    const std::int64_t row = i / chunks, chunk = i % chunks;
    Chunk<T> values;
    values.load(p, static_cast<const T*>(p.x) + row * p.x_stride, chunk);
    float amax = largest(values);
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(~0U, amax, offset));
    }
    const float scale = scale_of<kInt8>(amax);
    if (chunk % 8 == 0) {
      p.scale[chunk / 8 * p.scale_stride + row] = scale;
      pad_scales(p, row, chunk / 8);
    }
    reinterpret_cast<uint4*>(p.codes)[i] = encode<kInt8>(values, scale);
  }
}

template <class T, bool kInt8>
void launch_quantize(const QuantizeRowsArgs& args, bool groups, cudaStream_t stream) {
  const std::int64_t chunks = args.width / kChunk;
  if (groups) {
    const std::int64_t ctas = (args.num_rows * chunks + kMostThreads - 1) / kMostThreads;
    device::launch(quantize_groups_kernel<T, kInt8>, unsigned(std::min<std::int64_t>(ctas, 65535)),
                   kMostThreads, 0, stream, args);
  } else {
    const auto threads = std::min<std::int64_t>((chunks + 31) / 32 * 32, kMostThreads);
    device::launch(quantize_rows_kernel<T, kInt8>, unsigned(args.num_rows), unsigned(threads), 0,
                   stream, args);
  }
}

}  // namespace

void quantize_rows_cuda(const QuantizeRowsParams& p, const Stream& stream) {
  const int bytes = dtype_bytes(p.x.dtype);
  const QuantizeRowsArgs args{
      p.x.data,
      p.codes.as<std::uint8_t>(),
      p.scale.as<float>(),
      p.x.size(0),
      p.x.size(1),
      p.x.stride(0),
      p.codes.size(1),
      p.scale.size(1),
      reinterpret_cast<std::uintptr_t>(p.x.data) % 16 == 0 && p.x.stride(0) * bytes % 16 == 0};
  FASTGPT_CHECK(reinterpret_cast<std::uintptr_t>(args.codes) % 16 == 0,
                "codes starts at an address that is no multiple of 16");
  const bool groups = p.scale.size(0) > 1;
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  const auto launch = [&](auto tag) {
    using T = decltype(tag);
    p.codes.dtype == DType::kI8 ? launch_quantize<T, true>(args, groups, handle)
                                : launch_quantize<T, false>(args, groups, handle);
  };
  switch (p.x.dtype) {
    case DType::kF16:
      return launch(__half{});
    case DType::kBF16:
      return launch(__nv_bfloat16{});
    default:
      return launch(float{});
  }
}

}  // namespace fastgpt::gemm
