#include "fastgpt/check.h"
#include "fastgpt/cpu_isa.h"
#include "fastgpt/tensor_check.h"
#include "gemm/eight_bit_kernels.h"
#include "gemm/kernels.h"

namespace fastgpt::gemm {
namespace {

// int8 sums of this many columns stay below 2^31: 127 * 128 * k.
constexpr std::int64_t kMostColumns = std::int64_t{1} << 17;

void check_codes(const TensorView& codes, const TensorView& scale, std::int64_t num_rows,
                 std::int64_t k) {
  FASTGPT_CHECK_TENSOR(codes, "codes", 2);
  FASTGPT_CHECK_TENSOR(scale, "scale", 2);
  FASTGPT_CHECK(codes.dtype == DType::kU8 || codes.dtype == DType::kI8, "codes is ",
                dtype_name(codes.dtype), "; expected uint8 (e4m3) or int8");
  check_dtype(scale, "scale", DType::kF32);
  FASTGPT_CHECK(k >= 1 && k <= kMostColumns, "rows have ", k, " columns; expected 1 to ",
                kMostColumns);
  check_size(codes, "codes", 0, num_rows, "the rows of x");
  check_size(codes, "codes", 1, row_codes_width(k), "the columns of x, padded to 128");
  const std::int64_t groups = row_codes_width(k) / kRowGroup;
  FASTGPT_CHECK(scale.size(0) == 1 || scale.size(0) == groups, "scale has ", scale.size(0),
                " rows; expected 1, or ", groups, " for a scale per 128 columns");
  check_size(scale, "scale", 1, row_scales_width(num_rows), "the rows of x, padded to 4");
  FASTGPT_CHECK(codes.is_contiguous() && scale.is_contiguous(),
                "codes or scale is not contiguous; call .contiguous()");
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.x, "x", 2);
  check_floating(p.x, "x");
  check_codes(p.codes, p.scale, p.x.size(0), p.x.size(1));
  if (p.x.size(0) == 0) return;
  FASTGPT_DISPATCH(stream, quantize_rows, p);
}

void linear_eight_bit(const EightBitLinearParams& p, const Stream& stream) {
  FASTGPT_CHECK_TENSOR(p.out, "out", 2);
  check_floating(p.out, "out");
  const std::int64_t n = p.out.size(1);
  check_codes(p.codes, p.scale, p.out.size(0), p.k);
  FASTGPT_CHECK(p.weight.format == WeightFormat::kFp8 || p.weight.format == WeightFormat::kInt8,
                "the weight is neither fp8 nor int8");
  FASTGPT_CHECK(p.codes.dtype == code_dtype(p.weight.format), "codes is ",
                dtype_name(p.codes.dtype), "; the weight's format multiplies ",
                dtype_name(code_dtype(p.weight.format)));
  check_weight(p.weight, n, p.k, -1, stream.device_type);
  // One group is a scale of the row and of the group at once.
  const std::int64_t groups = p.weight.scale.ndim == 2 ? row_codes_width(p.k) / kRowGroup : 1;
  FASTGPT_CHECK(p.scale.size(0) == groups, "scale has ", p.scale.size(0), " rows; expected ",
                groups, ", as this weight's scales are per ",
                p.weight.scale.ndim == 2 ? "128 x 128" : "channel");
  if (p.bias) {
    FASTGPT_CHECK_TENSOR(p.bias, "bias", 1);
    check_size(p.bias, "bias", 0, n, "the columns of out");
    check_floating(p.bias, "bias");
  }
  if (p.out.numel() == 0) return;
  FASTGPT_DISPATCH(stream, linear_eight_bit, p);
}

bool has_eight_bit_product(WeightFormat format, const Stream& stream) {
  if (format != WeightFormat::kFp8 && format != WeightFormat::kInt8) return false;
  if (stream.device_type == DeviceType::kCPU) {
    return format == WeightFormat::kInt8 && cpu_isa() == CpuIsa::kAVX512;
  }
#ifdef FASTGPT_WITH_CUDA
  const CurrentDevice current(stream.device);
  return has_eight_bit_product_cuda();
#else
  return false;
#endif
}

}  // namespace fastgpt::gemm
