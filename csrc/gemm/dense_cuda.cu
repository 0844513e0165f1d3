#include "gemm/launch.cuh"

namespace fastgpt::gemm {

void dense_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                   cudaStream_t stream) {
  launch_quantized<WeightFormat::kDense>(args, num_batches, traits, stream);
}

}  // namespace fastgpt::gemm
