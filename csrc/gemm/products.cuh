// The tensor-core products, one translation unit per weight format.
#pragma once
#include "device/arch.cuh"
#include "gemm/arguments.cuh"

namespace fastgpt::gemm {

// Preconditions: arch >= 80, x is float16 or bfloat16. dense: 16-bit aligned weight rows.
void int4_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                  cudaStream_t stream);
void fp8_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                 cudaStream_t stream);
void int8_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                  cudaStream_t stream);
void dense_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                   cudaStream_t stream);
void mixed_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                   cudaStream_t stream);

// The same for many rows on Hopper. Preconditions: takes_hopper (linear_cuda.cu).
void hopper_int4_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                         cudaStream_t stream);
void hopper_fp8_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                        cudaStream_t stream);
void hopper_int8_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                         cudaStream_t stream);
void hopper_dense_product(const ProductArgs& args, int num_batches, const device::Traits& traits,
                          cudaStream_t stream);

}  // namespace fastgpt::gemm
