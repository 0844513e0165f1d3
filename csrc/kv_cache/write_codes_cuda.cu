#include <cuda_runtime.h>

#include "device/dependent.cuh"
#include "device/dequant.cuh"
#include "device/reduce.cuh"
#include "device/rotate.cuh"
#include "device/types.cuh"
#include "device/vec.cuh"
#include "fastgpt/check.h"
#include "fastgpt/fp8.h"
#include "fastgpt/kv_format.h"
#include "kv_cache/heads.cuh"
#include "kv_cache/kernels.h"

namespace fastgpt::kv_cache {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxGroups = 31;  // of a latent row: a warp each, and one for the rotary columns

struct CodeArgs {
  const std::int64_t* positions;
  std::int64_t position_stride;
  device::AngleTable table;  // without pairs nothing turns, and positions are not read
  Heads q;
  Heads k;
  Heads v;
  bool interleaved;
  const std::int64_t* slot_mapping;
  std::int64_t slot_mapping_stride;
  std::uint8_t* cache;
  DType cache_dtype;
  std::int64_t num_blocks;
  std::int64_t block_size;
  std::int64_t block_stride;
  std::int64_t value_offset;
  std::int64_t slot_stride;
  std::int64_t cache_head_stride;
  float* scale;
  std::int64_t scale_block_stride;
  std::int64_t scale_value_offset;
  std::int64_t scale_head_stride;
};

struct LatentArgs {
  const void* latent;
  std::int64_t latent_stride;
  int width;
  const void* pe;
  std::int64_t pe_stride;
  int pe_width;
  DType dtype;
  const std::int64_t* slot_mapping;
  std::int64_t slot_mapping_stride;
  std::uint8_t* cache;
  DType cache_dtype;
  std::int64_t num_blocks;
  std::int64_t block_size;
  std::int64_t block_stride;
  std::int64_t slot_stride;
  float* scale;
  std::int64_t scale_block_stride;
  std::int64_t scale_slot_stride;
  void* pe_cache;
  DType pe_cache_dtype;
  std::int64_t pe_block_stride;
  std::int64_t pe_slot_stride;
};

// A warp turns the first 2 * num_pairs columns of a row in place.
template <class T>
__device__ void rotate_row(const CodeArgs& p, std::int64_t position, T* x) {
  const int num_pairs = p.table.num_pairs;
  for (int pair = int(threadIdx.x % 32); pair < num_pairs; pair += 32) {
    const int first = p.interleaved ? 2 * pair : pair;
    const int second = p.interleaved ? 2 * pair + 1 : pair + num_pairs;
    const float2 result = device::rotate_pair(p.table, position, pair, device::to_float(x[first]),
                                              device::to_float(x[second]));
    x[first] = device::from_float<T>(result.x);
    x[second] = device::from_float<T>(result.y);
  }
  __syncwarp();  // lanes read what others have turned
}

// A warp writes the codes of one row and returns their scale: what the CPU computes, bit for bit.
template <class Load>
__device__ float quantize_row(Load&& load, int width, DType dtype, std::uint8_t* codes) {
  float amax = 0.0F;
  bool is_finite = true;
  for (int i = int(threadIdx.x % 32); i < width; i += 32) {
    const float magnitude = fabsf(load(i));
    is_finite = is_finite && magnitude <= 3.402823466e38F;
    amax = fmaxf(amax, magnitude);
  }
  amax = device::warp_max(amax);
  is_finite = __all_sync(~0U, is_finite) != 0;
  const float largest = dtype == DType::kU8 ? kFp8Largest : kInt8Largest;
  float scale = amax / largest;
  if (!(scale > 0.0F)) scale = 1.0F;
  for (int i = int(threadIdx.x % 32); i < width; i += 32) {
    const float code = is_finite ? fminf(fmaxf(load(i) / scale, -largest), largest) : 0.0F;
    codes[i] = dtype == DType::kU8 ? device::float_to_fp8(code) : std::uint8_t(int(rintf(code)));
  }
  return is_finite ? scale : __int_as_float(0x7FC00000);
}

// One warp owns one row of a token: it turns a query; turns and stores a key; stores a value. Rows
// are numbered heads of q | heads of k | heads of v. Grid: (num_tokens, ceil(rows / kWarps)). A
// slot outside the cache stores nothing.
template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    rotary_write_codes_kernel(const __grid_constant__ device::Dependent<CodeArgs> dependent) {
  const CodeArgs& p = dependent.wait();
  const std::int64_t token = blockIdx.x;
  int row = int(blockIdx.y) * kWarps + int(threadIdx.x / 32);
  if (row < p.q.num_heads + p.k.num_heads && p.table.num_pairs > 0) {
    T* x = row < p.q.num_heads ? head_row<T>(p.q, token, row)
                               : head_row<T>(p.k, token, row - p.q.num_heads);
    rotate_row(p, p.positions[token * p.position_stride], x);
  }
  row -= p.q.num_heads;
  const std::int64_t slot = p.slot_mapping[token * p.slot_mapping_stride];
  if (row < 0 || row >= p.k.num_heads + p.v.num_heads) return;
  if (slot < 0 || slot >= p.num_blocks * p.block_size) return;
  const int is_value = row >= p.k.num_heads ? 1 : 0;
  const int head = row - is_value * p.k.num_heads;
  const Heads& heads = is_value != 0 ? p.v : p.k;
  const std::int64_t block = slot / p.block_size;
  const std::int64_t offset = slot % p.block_size;
  const T* x = head_row<T>(heads, token, head);
  const float scale =
      quantize_row([&](int i) { return device::to_float(x[i]); }, heads.width, p.cache_dtype,
                   p.cache + block * p.block_stride + is_value * p.value_offset +
                       offset * p.slot_stride + head * p.cache_head_stride);
  if (threadIdx.x % 32 == 0) {
    p.scale[block * p.scale_block_stride + is_value * p.scale_value_offset +
            head * p.scale_head_stride + offset] = scale;
  }
}

// One CTA stores one token: a warp the codes of 128 latent columns, the last warp the rotary
// columns. Grid: num_tokens. A slot outside the cache stores nothing.
__global__ void __launch_bounds__((kMaxGroups + 1) * 32)
    write_latent_codes_kernel(const __grid_constant__ device::Dependent<LatentArgs> dependent) {
  const LatentArgs& p = dependent.wait();
  const std::int64_t token = blockIdx.x;
  const std::int64_t slot = p.slot_mapping[token * p.slot_mapping_stride];
  if (slot < 0 || slot >= p.num_blocks * p.block_size) return;
  const std::int64_t block = slot / p.block_size;
  const std::int64_t offset = slot % p.block_size;
  const int group = int(threadIdx.x / 32);
  const int first = group * int(kLatentGroup);
  if (first >= p.width) {
    const std::int64_t target = block * p.pe_block_stride + offset * p.pe_slot_stride;
    for (int i = int(threadIdx.x % 32); i < p.pe_width; i += 32) {
      device::store_float(p.pe_cache, p.pe_cache_dtype, target + i,
                          device::load_float(p.pe, p.dtype, token * p.pe_stride + i));
    }
    return;
  }
  const std::int64_t source = token * p.latent_stride + first;
  const float scale =
      quantize_row([&](int i) { return device::load_float(p.latent, p.dtype, source + i); },
                   min(int(kLatentGroup), p.width - first), p.cache_dtype,
                   p.cache + block * p.block_stride + offset * p.slot_stride + first);
  if (threadIdx.x % 32 == 0) {
    p.scale[block * p.scale_block_stride + offset * p.scale_slot_stride + group] = scale;
  }
}

void launch(CodeArgs args, const WriteKvParams& p, const Stream& stream) {
  const TensorView& cache = p.kv_cache;
  args.k = heads_of(p.k);
  args.v = heads_of(p.v);
  args.slot_mapping = p.slot_mapping.as<std::int64_t>();
  args.slot_mapping_stride = p.slot_mapping.stride(0);
  args.cache = cache.as<std::uint8_t>();
  args.cache_dtype = cache.dtype;
  args.num_blocks = cache.size(0);
  args.block_size = cache.size(2);
  args.block_stride = cache.stride(0);
  args.value_offset = cache.stride(1);
  args.slot_stride = cache.stride(2);
  args.cache_head_stride = cache.stride(3);
  args.scale = p.kv_scale.as<float>();
  args.scale_block_stride = p.kv_scale.stride(0);
  args.scale_value_offset = p.kv_scale.stride(1);
  args.scale_head_stride = p.kv_scale.stride(2);
  const std::int64_t rows = std::int64_t(args.q.num_heads) + args.k.num_heads + args.v.num_heads;
  FASTGPT_CHECK(rows <= 65535LL * kWarps, "a token has ", rows, " heads; expected at most ",
                65535LL * kWarps);
  const dim3 grid(unsigned(p.k.size(0)), unsigned((rows + kWarps - 1) / kWarps));
  device::dispatch_float(p.k.dtype, [&](auto tag) {
    device::launch(rotary_write_codes_kernel<decltype(tag)>, grid, kWarps * 32, 0,
                   static_cast<cudaStream_t>(stream.handle), args);
  });
}

}  // namespace

void write_codes_cuda(const WriteKvParams& p, const Stream& stream) {
  launch(CodeArgs{}, p, stream);
}

void rotary_write_codes_cuda(const RotaryWriteKvParams& p, const Stream& stream) {
  CodeArgs args{};
  args.positions = p.positions.as<std::int64_t>();
  args.position_stride = p.positions.stride(0);
  args.table = {p.cos_sin.as<float>(), p.cos_sin.stride(0), p.cos_sin.size(0),
                int(p.cos_sin.size(1) / 2)};
  args.q = heads_of(p.q);
  args.interleaved = p.interleaved;
  if (p.q.size(1) + p.k.size(1) == 0) return;
  launch(args, {p.k, p.v, p.slot_mapping, p.kv_cache, p.kv_scale}, stream);
}

void write_latent_codes_cuda(const WriteMlaParams& p, const Stream& stream) {
  LatentArgs args{};
  args.latent = p.kv_latent.data;
  args.latent_stride = p.kv_latent.stride(0);
  args.width = int(p.kv_latent.size(1));
  args.pe = p.k_pe.data;
  args.pe_stride = p.k_pe.stride(0);
  args.pe_width = int(p.k_pe.size(1));
  args.dtype = p.kv_latent.dtype;
  args.slot_mapping = p.slot_mapping.as<std::int64_t>();
  args.slot_mapping_stride = p.slot_mapping.stride(0);
  args.cache = p.kv_cache.as<std::uint8_t>();
  args.cache_dtype = p.kv_cache.dtype;
  args.num_blocks = p.kv_cache.size(0);
  args.block_size = p.kv_cache.size(1);
  args.block_stride = p.kv_cache.stride(0);
  args.slot_stride = p.kv_cache.stride(1);
  args.scale = p.kv_scale.as<float>();
  args.scale_block_stride = p.kv_scale.stride(0);
  args.scale_slot_stride = p.kv_scale.stride(1);
  args.pe_cache = p.pe_cache.data;
  args.pe_cache_dtype = p.pe_cache.dtype;
  args.pe_block_stride = p.pe_cache.stride(0);
  args.pe_slot_stride = p.pe_cache.stride(1);
  const std::int64_t groups = num_latent_groups(args.width);
  FASTGPT_CHECK(groups <= kMaxGroups, "kv_latent has ", args.width, " columns; expected at most ",
                kMaxGroups * kLatentGroup);
  device::launch(write_latent_codes_kernel, unsigned(p.kv_latent.size(0)),
                 unsigned((groups + 1) * 32), 0, static_cast<cudaStream_t>(stream.handle), args);
}

}  // namespace fastgpt::kv_cache
