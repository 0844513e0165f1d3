#include "gemm/hopper_launch.cuh"
#include "gemm/products.cuh"

namespace fastgpt::gemm {

void hopper_int8_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                         cudaStream_t stream) {
  if (args.x_dtype == DType::kF16) {
    launch_hopper<WeightFormat::kInt8, __half>(args, num_batches, traits, stream);
  } else {
    launch_hopper<WeightFormat::kInt8, __nv_bfloat16>(args, num_batches, traits, stream);
  }
}

}  // namespace fastgpt::gemm
