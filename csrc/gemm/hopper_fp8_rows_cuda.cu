#include "gemm/hopper_eight_bit_launch.cuh"

namespace fastgpt::gemm {

void hopper_fp8_rows_product(EightBitArgs& args, bool groups, const device::Traits& traits,
                             cudaStream_t stream) {
  const auto launch = [&](auto x) {
    using X = decltype(x);
    groups ? launch_eight_bit<WeightFormat::kFp8, X, true>(args, traits, stream)
           : launch_eight_bit<WeightFormat::kFp8, X, false>(args, traits, stream);
  };
  args.tiles.product.out_dtype == DType::kF16 ? launch(__half{}) : launch(__nv_bfloat16{});
}

}  // namespace fastgpt::gemm
