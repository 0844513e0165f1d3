// What the CPU driver of eight-bit products (eight_bit_cpu.cpp) hands to the kernels of one
// instruction set (eight_bit_*.cpp).
#pragma once
#include <cstdint>

#include "fastgpt/tensor_view.h"

namespace fastgpt::gemm {

/// Every four codes of a row lie in the weight's order of bytes: columns 0 2 1 3 (cpu_layout.h).
struct QuantizeRowTask {
  const void* x;  // [k]
  DType x_dtype;
  std::int64_t k;
  std::int64_t group;   // values that share a scale
  std::int8_t* codes;   // [k padded to 128]
  float* scale;         // of the first group
  std::int64_t stride;  // to the scale of the next one
};

/// Rows first_row .. last_row - 1 of out in columns of blocks block_begin .. block_end - 1.
struct EightBitTask {
  const std::int8_t* codes;
  std::int64_t codes_stride;
  const float* row_scale;        // [num_rows]
  const std::int32_t* row_sums;  // [num_rows] of the codes
  const std::int8_t* weight;     // [block][step][panel][2 words of 16 lanes][4]
  const float* channel_scale;    // [n]
  const float* bias;             // [n] or nullptr
  std::int64_t num_rows;
  std::int64_t n;
  std::int64_t steps;  // of 8 columns
  void* out;
  DType out_dtype;
  std::int64_t out_stride;
  std::int64_t block_begin;
  std::int64_t block_end;
};

struct EightBitKernels {
  void (*quantize_int8)(const QuantizeRowTask&);
  void (*multiply)(const EightBitTask&);
};

EightBitKernels eight_bit_kernels_portable();
EightBitKernels eight_bit_kernels_avx2();
EightBitKernels eight_bit_kernels_avx512();

}  // namespace fastgpt::gemm
