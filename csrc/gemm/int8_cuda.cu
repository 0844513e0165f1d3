#include "gemm/launch.cuh"

namespace fastgpt::gemm {

void int8_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                  cudaStream_t stream) {
  launch_quantized<WeightFormat::kInt8>(args, num_batches, traits, stream);
}

}  // namespace fastgpt::gemm
