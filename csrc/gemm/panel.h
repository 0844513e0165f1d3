// One product on one range of column blocks: what the driver (linear_cpu.cpp) hands to the kernels
// of one instruction set (panel_*.cpp).
#pragma once
#include <cstdint>

#include "fastgpt/tensor_view.h"

namespace fastgpt::gemm {

enum class Storage { kF32, kF16, kBF16, kFp8, kInt8, kInt4, kRowMajor };

/// Columns past `n` and values past k are computed on zeros and not stored.
struct PanelTask {
  Storage storage;
  const std::uint8_t* weight;  // arranged (cpu_layout.h), or row-major [n, k]
  DType row_dtype;             // kRowMajor: dtype of the weight
  std::int64_t row_bytes;      // kRowMajor: distance of two rows
  std::int64_t n;
  std::int64_t k;
  std::int64_t steps;          // of 8 positions along k
  std::int64_t segment_steps;  // partial sums of this many steps are scaled and added up
  // Scales: at most one of these three kinds.
  const float* channel_scale;        // [n], applied at the end
  const float* block_scale;          // [ceil(n / 128), num_segments], a segment is 128 long
  const std::uint16_t* group_scale;  // float16 [block][segment][64]
  const std::uint8_t* zero_point;    // [block][segment][64], with group_scale; nullptr = 8
  const float* bias;                 // [n] or nullptr
  std::int64_t num_rows;
  const void* const* x;        // num_rows rows of steps * 8 values, float or bfloat16
  const float* const* x_sums;  // num_rows rows of num_segments sums, with zero_point
  void* const* out;            // num_rows rows of n values
  DType out_dtype;
  std::int64_t block_begin;  // blocks of 64 columns to compute
  std::int64_t block_end;

  std::int64_t num_segments() const { return (steps + segment_steps - 1) / segment_steps; }
};

/// The kernels of one instruction set. Every row is computed by the same sequence of operations
/// whatever num_rows and the block range are.
struct PanelKernels {
  void (*f32)(const PanelTask&);   // x rows are float32
  void (*bf16)(const PanelTask&);  // x rows are bfloat16; not kF32 and kF16
};

PanelKernels panel_kernels_portable();
PanelKernels panel_kernels_avx2();
PanelKernels panel_kernels_avx512();
PanelKernels panel_kernels_avx512bf16();

}  // namespace fastgpt::gemm
