#include "gemm/launch.cuh"

namespace fastgpt::gemm {

// float16 weights with bfloat16 x (an io layer of a bfloat16 model), or the reverse.
void mixed_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                   cudaStream_t stream) {
  if (args.x_dtype == DType::kF16) {
    launch_product<WeightFormat::kDense, __nv_bfloat16, __half>(args, num_batches, traits, stream);
  } else {
    launch_product<WeightFormat::kDense, __half, __nv_bfloat16>(args, num_batches, traits, stream);
  }
}

}  // namespace fastgpt::gemm
