#include "gemm/launch.cuh"

namespace fastgpt::gemm {

void fp8_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                 cudaStream_t stream) {
  launch_quantized<WeightFormat::kFp8>(args, num_batches, traits, stream);
}

}  // namespace fastgpt::gemm
