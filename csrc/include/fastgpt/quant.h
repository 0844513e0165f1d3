// Weights between floating point and their canonical quantized form (the form on disk).
//
//     x = (code - zero_point) * scale            int4; fp8, int8: zero_point 0
//     x = offset + (bit ? scale : -scale)        binary
#pragma once
#include "fastgpt/device.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::quant {

/// fp8 e4m3fn codes with one scale per row, or per 128 x 128 block when scale has two dimensions.
/// Quantizing uses scale = amax / 448, 1 for an all-zero row or block.
struct Fp8Params {
  TensorView x;       // [rows, cols] float32, bfloat16 or float16
  TensorView packed;  // uint8 [rows, cols]
  TensorView scale;   // float32 [rows] or [ceil(rows/128), ceil(cols/128)]
};
void quantize_fp8(const Fp8Params& params, const Stream& stream);    // x -> packed, scale
void dequantize_fp8(const Fp8Params& params, const Stream& stream);  // packed, scale -> x

/// Two's complement codes with one scale per row. Quantizing uses scale = amax / 127, 1 for a row
/// of zeros, and codes -127 .. 127; -128 is read like any other.
struct Int8Params {
  TensorView x;       // [rows, cols] float32, bfloat16 or float16
  TensorView packed;  // int8 [rows, cols]
  TensorView scale;   // float32 [rows]
};
void quantize_int8(const Int8Params& params, const Stream& stream);    // x -> packed, scale
void dequantize_int8(const Int8Params& params, const Stream& stream);  // packed, scale -> x

/// Two codes a byte: column 2b in the low nibble, 2b + 1 in the high one; rows padded to 16 bytes
/// with the code that means zero. The last group of a row may be short.
/// Quantizing is symmetric without zero_point (scale = amax / 7, zero at code 8), else affine.
/// Source: affine quantization, r = S (q - Z), arXiv:1712.05877, section 2.1.
struct Int4Params {
  TensorView x;           // [rows, cols] float32, bfloat16 or float16
  TensorView packed;      // uint8 [rows, round_up(ceil(cols / 2), 16)]
  TensorView scale;       // float16 [rows, ceil(cols / group_size)], > 0
  TensorView zero_point;  // uint8 [rows, ceil(cols / group_size)]; absent = 8
  int group_size;         // even, >= 2
};
void quantize_int4(const Int4Params& params, const Stream& stream);
void dequantize_int4(const Int4Params& params, const Stream& stream);

/// One bit a value, two levels per group of 128: offset + scale and offset - scale.
struct BinaryParams {
  TensorView x;       // [numel] float32, bfloat16 or float16
  TensorView packed;  // uint8 [ceil(numel / 8)], value i is bit i % 8 of byte i / 8
  TensorView scale;   // float32 [ceil(numel / 128)]
  TensorView offset;  // float32 [ceil(numel / 128)]
};
void quantize_binary(const BinaryParams& params, const Stream& stream);
void dequantize_binary(const BinaryParams& params, const Stream& stream);

/// Codes of a block of columns of a weight, one column after another; what rounding a column loses
/// is taken from the columns behind it. Columns are stored as rows. Strided by rows. Source: GPTQ,
/// arXiv:2210.17323, algorithm 1.
struct GptqParams {
  TensorView left;    // float32 [cols, rows], cols <= 128: what is left to round
  TensorView scale;   // float32 [cols, rows], > 0
  TensorView zero;    // float32 [cols, rows], integers
  TensorView spread;  // float32 [cols, cols], upper: inverse(Gram matrix) = spreadᵀ spread
  TensorView codes;   // uint8 [cols, rows]
  TensorView errors;  // float32 [cols, rows]: what columns behind the block must take over
  int top;            // largest code, 1 .. 255
};
void gptq_round(const GptqParams& params, const Stream& stream);

}  // namespace fastgpt::quant
