#include "gemm/hopper_eight_bit_launch.cuh"

namespace fastgpt::gemm {

void hopper_int8_rows_product(EightBitArgs& args, const device::Traits& traits,
                              cudaStream_t stream) {
  if (args.tiles.product.out_dtype == DType::kF16) {
    launch_eight_bit<WeightFormat::kInt8, __half, false>(args, traits, stream);
  } else {
    launch_eight_bit<WeightFormat::kInt8, __nv_bfloat16, false>(args, traits, stream);
  }
}

}  // namespace fastgpt::gemm
