// The tensor-core products, one translation unit per weight format.
#pragma once
#include <algorithm>

#include "device/arch.cuh"
#include "gemm/arguments.cuh"

namespace fastgpt::gemm {

/// Rows of x per weight up to which the streaming kernel (decode.cuh) is always taken.
inline constexpr std::int64_t kDecodeRows = 16;

/// Rows of x of its widest tile. Where so many stay in L1, its passes over x cost nothing.
inline constexpr std::int64_t kDecodeTileRows = 32;

/// True if 32 rows of x stay in L1; linear and batched.
inline bool keeps_x_in_l1(const ProductArgs& p) {
  constexpr std::int64_t kBytes = 128 << 10;
  return p.sorted_rows == nullptr && std::min(p.num_rows, kDecodeTileRows) * p.k * 2 <= kBytes;
}

/// True if it also leaves tiles of 128 weight rows nothing to fill the device with.
inline bool is_small_product(const ProductArgs& p, int num_batches, int num_sms) {
  const std::int64_t row_tiles = (p.num_rows + kDecodeTileRows - 1) / kDecodeTileRows;
  return keeps_x_in_l1(p) && p.num_rows <= 2 * kDecodeTileRows &&
         (p.n + 15) / 16 * row_tiles * num_batches <= 2 * std::int64_t(num_sms);
}

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
