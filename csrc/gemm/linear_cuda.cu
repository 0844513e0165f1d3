#include "device/hopper.cuh"
#include "gemm/kernels.h"
#include "gemm/layout.cuh"
#include "gemm/products.cuh"
#include "gemm/simt.cuh"

namespace fastgpt::gemm {
namespace {

bool aligned_16(const void* data, std::int64_t stride_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

bool is_half(DType dtype) { return dtype == DType::kF16 || dtype == DType::kBF16; }

void set_weight(ProductArgs& args, const WeightView& weight, bool stacked) {
  args.packed = weight.packed.as<std::uint8_t>();
  args.scale = weight.scale.data;
  args.zero_point = weight.zero_point.as<std::uint8_t>();
  args.weight_dtype = weight.packed.dtype;
  const int bytes = dtype_bytes(weight.packed.dtype);
  if (weight.format == WeightFormat::kDense) {
    args.weight_row_bytes = weight.packed.stride(-2) * bytes;
  } else if (weight.format == WeightFormat::kFp8) {
    args.block_scale = weight.scale.ndim == (stacked ? 3 : 2);
  } else if (weight.format == WeightFormat::kInt4) {
    args.group_size = arranged_group_size(weight.group_size);
  }
  if (!stacked) return;
  args.weight_batch_bytes = weight.packed.stride(0) * bytes;
  if (weight.scale)
    args.scale_batch_bytes = weight.scale.stride(0) * dtype_bytes(weight.scale.dtype);
  if (weight.zero_point) args.zero_batch_bytes = weight.zero_point.stride(0);
}

/// Rows of x per weight from which on the kernel for Hopper is taken where its code runs.
constexpr std::int64_t kHopperRows = 33;

bool takes_hopper(const ProductArgs& p, WeightFormat format, int num_batches) {
  if (format == WeightFormat::kDense && (!p.weight_aligned || p.weight_dtype != p.x_dtype)) {
    return false;
  }
  const bool grouped = p.sorted_rows != nullptr;
  const std::int64_t rows = grouped ? ceil_div(p.num_rows, std::max(p.num_experts, 1)) : p.num_rows;
  if (rows < kHopperRows || p.k == 0 || !p.x_aligned || !device::hopper_traits().has_wgmma) {
    return false;
  }
  // TMA refuses a stride of 0: a row or a head that stands for many. Rows of experts come one by
  // one, but their weights do not.
  if (grouped) return (p.num_experts == 1 || p.weight_batch_bytes > 0) && p.x_stride < (1LL << 31);
  return p.x_stride > 0 && (num_batches == 1 || (p.x_batch_stride > 0 && p.weight_batch_bytes > 0));
}

// Tensor cores multiply 16-bit x; what they cannot take goes to the CUDA cores.
void product(ProductArgs& args, WeightFormat format, int num_batches, cudaStream_t stream) {
  args.x_aligned = aligned_16(args.x, args.x_stride * dtype_bytes(args.x_dtype)) &&
                   args.x_batch_stride * dtype_bytes(args.x_dtype) % 16 == 0;
  const std::int64_t out_bytes = dtype_bytes(args.out_dtype);
  args.out_aligned = aligned_16(args.out, args.out_stride * out_bytes) &&
                     args.out_batch_stride * out_bytes % 16 == 0;
  args.weight_aligned = aligned_16(args.packed, args.weight_row_bytes) && args.k % 8 == 0 &&
                        args.weight_batch_bytes % 16 == 0;
  const device::Traits& traits = device::current_traits();
  if (traits.arch < 80 || !is_half(args.x_dtype)) {
    return simt_product(args, format, num_batches, stream);
  }
  if (takes_hopper(args, format, num_batches)) {
    switch (format) {
      case WeightFormat::kInt4:
        return hopper_int4_product(args, num_batches, traits, stream);
      case WeightFormat::kFp8:
        return hopper_fp8_product(args, num_batches, traits, stream);
      case WeightFormat::kInt8:
        return hopper_int8_product(args, num_batches, traits, stream);
      case WeightFormat::kDense:
        return hopper_dense_product(args, num_batches, traits, stream);
    }
  }
  switch (format) {
    case WeightFormat::kInt4:
      return int4_product(args, num_batches, traits, stream);
    case WeightFormat::kFp8:
      return fp8_product(args, num_batches, traits, stream);
    case WeightFormat::kInt8:
      return int8_product(args, num_batches, traits, stream);
    case WeightFormat::kDense:
      if (!args.weight_aligned || !is_half(args.weight_dtype)) {
        return simt_product(args, format, num_batches, stream);
      }
      return args.weight_dtype == args.x_dtype ? dense_product(args, num_batches, traits, stream)
                                               : mixed_product(args, num_batches, traits, stream);
  }
}

}  // namespace

void linear_cuda(const LinearParams& p, const Stream& stream) {
  ProductArgs args{};
  args.x = p.x.data;
  args.x_dtype = p.x.dtype;
  args.x_stride = p.x.stride(0);
  args.bias = p.bias.data;
  args.bias_dtype = p.bias.dtype;
  args.out = p.out.data;
  args.out_dtype = p.out.dtype;
  args.out_stride = p.out.stride(0);
  args.num_rows = p.x.size(0);
  args.n = p.out.size(1);
  args.k = p.x.size(1);
  set_weight(args, p.weight, false);
  if (args.num_rows == 0 || args.n == 0) return;
  product(args, p.weight.format, 1, static_cast<cudaStream_t>(stream.handle));
}

void grouped_linear_cuda(const GroupedLinearParams& p, const Stream& stream) {
  ProductArgs args{};
  args.x = p.x.data;
  args.x_dtype = p.x.dtype;
  args.x_stride = p.x.stride(0);
  args.out = p.out.data;
  args.out_dtype = p.out.dtype;
  args.out_stride = p.out.stride(0);
  args.num_rows = p.sorted_rows.size(0);
  args.n = p.out.size(1);
  args.k = p.x.size(1);
  args.sorted_rows = p.sorted_rows.as<std::int32_t>();
  args.offsets = p.offsets.as<std::int32_t>();
  args.rows_per_token = p.rows_per_token;
  args.num_experts = int(p.offsets.size(0) - 1);
  set_weight(args, p.weight, true);
  if (args.num_rows == 0 || args.n == 0) return;
  product(args, p.weight.format, 1, static_cast<cudaStream_t>(stream.handle));
}

void batched_linear_cuda(const BatchedLinearParams& p, const Stream& stream) {
  ProductArgs args{};
  args.x = p.x.data;
  args.x_dtype = p.x.dtype;
  args.x_stride = p.x.stride(0);
  args.x_batch_stride = p.x.stride(1);
  args.out = p.out.data;
  args.out_dtype = p.out.dtype;
  args.out_stride = p.out.stride(0);
  args.out_batch_stride = p.out.stride(1);
  args.num_rows = p.x.size(0);
  args.n = p.out.size(2);
  args.k = p.x.size(2);
  set_weight(args, {WeightFormat::kDense, p.weight, {}, {}, 0}, true);
  if (args.num_rows == 0 || args.n == 0 || p.x.size(1) == 0) return;
  product(args, WeightFormat::kDense, int(p.x.size(1)), static_cast<cudaStream_t>(stream.handle));
}

}  // namespace fastgpt::gemm
