#include "fastgpt/check.h"
#include "fastgpt/dispatch.h"
#include "fastgpt/gemm.h"
#include "gemm/kernels.h"

namespace fastgpt::gemm {
namespace {

void check_shape(const TensorView& view, const char* name, DType dtype, std::int64_t stacked,
                 const std::vector<std::int64_t>& shape) {
  const int lead = stacked >= 0 ? 1 : 0;
  FASTGPT_CHECK(view.defined, name, " is missing");
  FASTGPT_CHECK(view.dtype == dtype, name, " is ", dtype_name(view.dtype), "; expected ",
                dtype_name(dtype));
  FASTGPT_CHECK(view.ndim == int(shape.size()) + lead, name, " has ", view.ndim,
                " dimensions; expected ", shape.size() + std::size_t(lead));
  FASTGPT_CHECK(lead == 0 || view.size(0) == stacked, name, " stacks ", view.size(0),
                " weights; expected ", stacked);
  for (std::size_t i = 0; i < shape.size(); ++i) {
    FASTGPT_CHECK(view.size(int(i) + lead) == shape[i], name, " has size ",
                  view.size(int(i) + lead), " in dimension ", int(i) + lead, "; expected ",
                  shape[i]);
  }
  FASTGPT_CHECK(view.is_contiguous(), name, " is not contiguous; call .contiguous()");
}

}  // namespace

ArrangedShape arranged_shape(DeviceType device_type, WeightFormat format, std::int64_t n,
                             std::int64_t k, int group_size) {
  FASTGPT_CHECK(n >= 0 && k >= 0, "the weight is [", n, ", ", k, "]; expected sizes of 0 or more");
  if (format == WeightFormat::kInt4) {
    FASTGPT_CHECK(group_size >= 2 && group_size % 2 == 0, "group_size is ", group_size,
                  "; expected an even number, 2 or more");
  }
  if (device_type == DeviceType::kCUDA) {
#ifdef FASTGPT_WITH_CUDA
    return arranged_shape_cuda(format, n, k, group_size);
#else
    detail::fail<DeviceError>(__FILE__, __LINE__,
                              "arranged_shape: this build has no CUDA kernels; rebuild with nvcc "
                              "and FASTGPT_CUDA=1");
#endif
  }
  return arranged_shape_cpu(format, n, k, group_size);
}

void arrange_weight(const ArrangeParams& p, const Stream& stream) {
  FASTGPT_CHECK(p.weight.defined, "weight is missing");
  FASTGPT_CHECK(p.weight.ndim == 2 || p.weight.ndim == 3, "weight has ", p.weight.ndim,
                " dimensions; expected 2, or 3 for a stack");
  const std::int64_t stacked = p.weight.ndim == 3 ? p.weight.size(0) : -1;
  const std::int64_t n = p.weight.size(-2);
  const ArrangedShape shape = arranged_shape(stream.device_type, p.format, n, p.k, p.group_size);
  const bool is_dense = p.format == WeightFormat::kDense;
  const DType dtype = is_dense ? p.weight.dtype : code_dtype(p.format);
  FASTGPT_CHECK(!is_dense || is_floating(dtype), "weight is ", dtype_name(dtype),
                "; expected float32, float16 or bfloat16");
  const std::int64_t groups = p.group_size > 0 ? (p.k + p.group_size - 1) / p.group_size : 0;
  const std::int64_t row_bytes =
      p.format == WeightFormat::kInt4 ? ((p.k + 1) / 2 + 15) / 16 * 16 : p.k;
  check_shape(p.weight, "weight", dtype, stacked, {n, row_bytes});
  check_shape(p.out_packed, "out_packed", dtype, stacked, shape.packed);
  if (p.format == WeightFormat::kFp8 || p.format == WeightFormat::kInt8) {
    FASTGPT_CHECK(p.scale.defined, "scale is missing");
    const bool per_block = p.format == WeightFormat::kFp8 && p.scale.ndim == (stacked >= 0 ? 3 : 2);
    const std::vector<std::int64_t> scale =
        per_block ? std::vector<std::int64_t>{(n + 127) / 128, (p.k + 127) / 128}
                  : std::vector<std::int64_t>{n};
    check_shape(p.scale, "scale", DType::kF32, stacked, scale);
    check_shape(p.out_scale, "out_scale", DType::kF32, stacked, scale);
  } else if (p.format == WeightFormat::kInt4) {
    check_shape(p.scale, "scale", DType::kF16, stacked, {n, groups});
    check_shape(p.out_scale, "out_scale", DType::kF16, stacked, shape.scale);
    FASTGPT_CHECK(p.zero_point.defined == p.out_zero_point.defined,
                  "zero_point and out_zero_point go together; one of them is missing");
    if (p.zero_point) {
      check_shape(p.zero_point, "zero_point", DType::kU8, stacked, {n, groups});
      check_shape(p.out_zero_point, "out_zero_point", DType::kU8, stacked, shape.zero_point);
    }
  }
  if (p.weight.numel() == 0) return;
  FASTGPT_DISPATCH(stream, arrange_weight, p);
}

}  // namespace fastgpt::gemm
