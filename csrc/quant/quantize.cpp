// Argument checks and dispatch of the quantizers.
#include "fastgpt/check.h"
#include "fastgpt/dispatch.h"
#include "fastgpt/quant.h"
#include "quant/kernels.h"

namespace fastgpt::quant {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void check_part(const TensorView& part, const char* name, DType dtype,
                std::initializer_list<std::int64_t> shape) {
  FASTGPT_CHECK_TENSOR(part, name, int(shape.size()));
  FASTGPT_CHECK(part.dtype == dtype, name, " is ", dtype_name(part.dtype), "; expected ",
                dtype_name(dtype));
  int dim = 0;
  for (const std::int64_t size : shape) {
    FASTGPT_CHECK(part.size(dim) == size, name, " has size ", part.size(dim), " in dimension ", dim,
                  "; expected ", size);
    ++dim;
  }
  FASTGPT_CHECK(part.is_contiguous(), name, " is not contiguous; call .contiguous()");
}

void check_values(const TensorView& x, int rank) {
  FASTGPT_CHECK_TENSOR(x, "x", rank);
  FASTGPT_CHECK(is_floating(x.dtype), "x is ", dtype_name(x.dtype),
                "; expected float32, float16 or bfloat16");
}

void check(const Fp8Params& p) {
  check_values(p.x, 2);
  const std::int64_t rows = p.x.size(0);
  const std::int64_t cols = p.x.size(1);
  check_part(p.packed, "packed", DType::kU8, {rows, cols});
  if (p.scale.ndim == 2) {
    check_part(p.scale, "scale", DType::kF32, {ceil_div(rows, kBlock), ceil_div(cols, kBlock)});
  } else {
    check_part(p.scale, "scale", DType::kF32, {rows});
  }
}

void check(const Int8Params& p) {
  check_values(p.x, 2);
  check_part(p.packed, "packed", DType::kI8, {p.x.size(0), p.x.size(1)});
  check_part(p.scale, "scale", DType::kF32, {p.x.size(0)});
}

void check(const Int4Params& p) {
  check_values(p.x, 2);
  FASTGPT_CHECK(p.group_size >= 2 && p.group_size % 2 == 0, "group_size is ", p.group_size,
                "; expected an even number, 2 or more");
  const std::int64_t rows = p.x.size(0);
  const std::int64_t cols = p.x.size(1);
  const std::int64_t groups = ceil_div(cols, p.group_size);
  check_part(p.packed, "packed", DType::kU8, {rows, ceil_div(ceil_div(cols, 2), 16) * 16});
  check_part(p.scale, "scale", DType::kF16, {rows, groups});
  if (p.zero_point) check_part(p.zero_point, "zero_point", DType::kU8, {rows, groups});
}

void check(const BinaryParams& p) {
  check_values(p.x, 1);
  const std::int64_t numel = p.x.size(0);
  check_part(p.packed, "packed", DType::kU8, {ceil_div(numel, 8)});
  check_part(p.scale, "scale", DType::kF32, {ceil_div(numel, kBlock)});
  check_part(p.offset, "offset", DType::kF32, {ceil_div(numel, kBlock)});
}

void check_block(const TensorView& part, const char* name, DType dtype, std::int64_t cols,
                 std::int64_t rows) {
  FASTGPT_CHECK_TENSOR(part, name, 2);
  FASTGPT_CHECK(part.dtype == dtype, name, " is ", dtype_name(part.dtype), "; expected ",
                dtype_name(dtype));
  FASTGPT_CHECK(part.size(0) == cols && part.size(1) == rows, name, " is [", part.size(0), ", ",
                part.size(1), "]; expected [", cols, ", ", rows, "]");
}

void check(const GptqParams& p) {
  FASTGPT_CHECK_TENSOR(p.left, "left", 2);
  const std::int64_t cols = p.left.size(0), rows = p.left.size(1);
  FASTGPT_CHECK(cols <= kMaxGptqCols, "left has ", cols, " columns; expected ", kMaxGptqCols,
                " or fewer, split it");
  FASTGPT_CHECK(p.top >= 1 && p.top <= 255, "top is ", p.top, "; expected 1 .. 255");
  check_block(p.left, "left", DType::kF32, cols, rows);
  check_block(p.scale, "scale", DType::kF32, cols, rows);
  check_block(p.zero, "zero", DType::kF32, cols, rows);
  check_block(p.spread, "spread", DType::kF32, cols, cols);
  check_block(p.codes, "codes", DType::kU8, cols, rows);
  check_block(p.errors, "errors", DType::kF32, cols, rows);
}

}  // namespace

void gptq_round(const GptqParams& p, const Stream& stream) {
  check(p);
  if (p.left.numel() == 0) return;
  FASTGPT_DISPATCH(stream, gptq_round, p);
}

void quantize_fp8(const Fp8Params& p, const Stream& stream) {
  check(p);
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, quantize_fp8, p);
}

void dequantize_fp8(const Fp8Params& p, const Stream& stream) {
  check(p);
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, dequantize_fp8, p);
}

void quantize_int8(const Int8Params& p, const Stream& stream) {
  check(p);
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, quantize_int8, p);
}

void dequantize_int8(const Int8Params& p, const Stream& stream) {
  check(p);
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, dequantize_int8, p);
}

void quantize_int4(const Int4Params& p, const Stream& stream) {
  check(p);
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, quantize_int4, p);
}

void dequantize_int4(const Int4Params& p, const Stream& stream) {
  check(p);
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, dequantize_int4, p);
}

void quantize_binary(const BinaryParams& p, const Stream& stream) {
  check(p);
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, quantize_binary, p);
}

void dequantize_binary(const BinaryParams& p, const Stream& stream) {
  check(p);
  if (p.x.numel() == 0) return;
  FASTGPT_DISPATCH(stream, dequantize_binary, p);
}

}  // namespace fastgpt::quant
