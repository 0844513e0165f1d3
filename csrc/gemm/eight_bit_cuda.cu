#include "fastgpt/check.h"
#include "gemm/eight_bit_kernels.h"
#include "gemm/hopper_eight_bit_launch.cuh"

namespace fastgpt::gemm {

bool has_eight_bit_product_cuda() { return device::hopper_traits().has_wgmma; }

void linear_eight_bit_cuda(const EightBitLinearParams& p, const Stream& stream) {
  FASTGPT_CHECK(has_eight_bit_product_cuda(),
                "products of eight-bit rows need a GPU of compute capability 9.0; multiply 16-bit "
                "rows here");
  EightBitArgs args{};
  ProductArgs& product = args.tiles.product;
  product.x = p.codes.data;
  product.x_stride = p.codes.size(1);
  product.packed = p.weight.packed.as<std::uint8_t>();
  product.bias = p.bias.data;
  product.bias_dtype = p.bias.dtype;
  product.out = p.out.data;
  product.out_dtype = p.out.dtype;
  product.out_stride = p.out.stride(0);
  product.out_aligned = reinterpret_cast<std::uintptr_t>(p.out.data) % 16 == 0 &&
                        p.out.stride(0) * dtype_bytes(p.out.dtype) % 16 == 0;
  product.num_rows = p.codes.size(0);
  product.n = p.out.size(1);
  product.k = p.k;
  args.x_scale = p.scale.as<float>();
  args.x_scale_stride = p.scale.size(1);
  args.weight_scale = p.weight.scale.as<float>();
  const auto aligned = [](const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  };
  FASTGPT_CHECK(aligned(product.x) && aligned(product.packed) && aligned(args.x_scale),
                "codes, scale or the packed weight starts at an address that is no multiple of 16");
  const device::Traits& traits = device::current_traits();
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  if (p.weight.format == WeightFormat::kInt8) {
    hopper_int8_rows_product(args, traits, handle);
  } else {
    hopper_fp8_rows_product(args, p.weight.scale.ndim == 2, traits, handle);
  }
}

}  // namespace fastgpt::gemm
