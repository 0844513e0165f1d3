// Argument checks shared by the products.
#include "fastgpt/check.h"

#include <string>

#include "gemm/kernels.h"

namespace fastgpt::gemm {
namespace {

using Shape = std::vector<std::int64_t>;

std::string text(const Shape& shape) {
  std::string s = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    s += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return s + "]";
}

Shape shape_of(const TensorView& view) {
  return {view.sizes.begin(), view.sizes.begin() + view.ndim};
}

Shape with_stack(Shape shape, std::int64_t stacked) {
  if (stacked >= 0) shape.insert(shape.begin(), stacked);
  return shape;
}

void check_part(const TensorView& part, const char* name, DType dtype, const Shape& shape) {
  FASTGPT_CHECK(part.defined, name, " is missing; expected ", dtype_name(dtype), " ", text(shape));
  FASTGPT_CHECK(part.dtype == dtype, name, " is ", dtype_name(part.dtype), "; expected ",
                dtype_name(dtype));
  FASTGPT_CHECK(shape_of(part) == shape, name, " has shape ", text(shape_of(part)), "; expected ",
                text(shape), ", as fastgpt.ops.arrange returns it");
  FASTGPT_CHECK(part.is_contiguous(), name, " is not contiguous; call .contiguous()");
}

}  // namespace

void check_weight(const WeightView& w, std::int64_t n, std::int64_t k, std::int64_t stacked,
                  DeviceType device_type) {
  if (w.format == WeightFormat::kDense) {
    FASTGPT_CHECK(w.packed.defined, "weight is missing");
    FASTGPT_CHECK(is_floating(w.packed.dtype), "weight is ", dtype_name(w.packed.dtype),
                  "; expected float32, float16 or bfloat16");
    if (shape_of(w.packed) == with_stack({n, k}, stacked)) {
      FASTGPT_CHECK(w.packed.rows_contiguous(), "weight has stride ", w.packed.stride(-1),
                    " in its last dimension; expected 1, call .contiguous()");
      return;
    }
    const Shape arranged =
        with_stack(arranged_shape(device_type, w.format, n, k, 0).packed, stacked);
    FASTGPT_CHECK(shape_of(w.packed) == arranged, "weight has shape ", text(shape_of(w.packed)),
                  "; expected ", text(with_stack({n, k}, stacked)), " (or arranged, ",
                  text(arranged), ") for x of ", k, " and out of ", n, " columns");
    FASTGPT_CHECK(w.packed.is_contiguous(), "arranged weight is not contiguous");
    return;
  }
  if (w.format == WeightFormat::kFp8 || w.format == WeightFormat::kInt8) {
    const Shape packed = arranged_shape(device_type, w.format, n, k, 0).packed;
    check_part(w.packed, "packed", code_dtype(w.format), with_stack(packed, stacked));
    FASTGPT_CHECK(w.scale.defined, "scale is missing");
    const bool per_block = w.format == WeightFormat::kFp8 && w.scale.ndim == (stacked >= 0 ? 3 : 2);
    check_part(w.scale, "scale", DType::kF32,
               with_stack(per_block ? Shape{(n + 127) / 128, (k + 127) / 128} : Shape{n}, stacked));
    return;
  }
  FASTGPT_CHECK(w.group_size >= 2 && w.group_size % 2 == 0, "group_size is ", w.group_size,
                "; expected an even number, 2 or more");
  const ArrangedShape shape = arranged_shape(device_type, w.format, n, k, w.group_size);
  check_part(w.packed, "packed", DType::kU8, with_stack(shape.packed, stacked));
  check_part(w.scale, "scale", DType::kF16, with_stack(shape.scale, stacked));
  if (w.zero_point) {
    check_part(w.zero_point, "zero_point", DType::kU8, with_stack(shape.zero_point, stacked));
  }
}

void check_rows(const TensorView& x, const TensorView& out) {
  FASTGPT_CHECK(is_floating(x.dtype), "x is ", dtype_name(x.dtype),
                "; expected float32, float16 or bfloat16");
  FASTGPT_CHECK(out.dtype == x.dtype || out.dtype == DType::kF32, "out is ", dtype_name(out.dtype),
                ", x is ", dtype_name(x.dtype), "; expected x's dtype or float32");
}

}  // namespace fastgpt::gemm
