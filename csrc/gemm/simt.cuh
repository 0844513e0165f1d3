// Products on CUDA cores in float32: any pair of types, any shape, any compute capability. Taken
// for float32 x (parity) and where tensor cores cannot: compute capability 7.5, unaligned weights.
#pragma once
#include "gemm/arguments.cuh"

namespace fastgpt::gemm {

void simt_product(const ProductArgs& args, WeightFormat format, int num_batches,
                  cudaStream_t stream);

}  // namespace fastgpt::gemm
