#include "bindings/stable.h"
#include "fastgpt/gemm.h"

namespace fastgpt::bindings {
namespace {

using OptionalTensor = std::optional<Tensor>;
using gemm::WeightFormat;
using gemm::WeightView;

void run_linear(const Tensor& x, const WeightView& weight, const OptionalTensor& bias,
                const Tensor& out) {
  gemm::linear({view(x), weight, view(bias), view(out)}, stream_of(x));
}

void linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&weight, pointer(bias), &out});
    run_linear(x, {WeightFormat::kDense, view(weight), {}, {}, 0}, bias, out);
  });
}

void linear_fp8(const Tensor& x, const Tensor& packed, const Tensor& scale,
                const OptionalTensor& bias, const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&packed, &scale, pointer(bias), &out});
    run_linear(x, {WeightFormat::kFp8, view(packed), view(scale), {}, 0}, bias, out);
  });
}

void linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scale,
                 const OptionalTensor& bias, const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&packed, &scale, pointer(bias), &out});
    run_linear(x, {WeightFormat::kInt8, view(packed), view(scale), {}, 0}, bias, out);
  });
}

void linear_int4(const Tensor& x, const Tensor& packed, const Tensor& scale,
                 const OptionalTensor& zero_point, int64_t group_size, const OptionalTensor& bias,
                 const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&packed, &scale, pointer(zero_point), pointer(bias), &out});
    run_linear(x,
               {WeightFormat::kInt4, view(packed), view(scale), view(zero_point), int(group_size)},
               bias, out);
  });
}

void run_grouped(const Tensor& x, const WeightView& weight, const Tensor& sorted_rows,
                 const Tensor& offsets, int64_t rows_per_token, const Tensor& out) {
  gemm::grouped_linear(
      {view(x), weight, view(sorted_rows), view(offsets), rows_per_token, view(out)}, stream_of(x));
}

void grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& sorted_rows,
                    const Tensor& offsets, int64_t rows_per_token, const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&weight, &sorted_rows, &offsets, &out});
    run_grouped(x, {WeightFormat::kDense, view(weight), {}, {}, 0}, sorted_rows, offsets,
                rows_per_token, out);
  });
}

void grouped_linear_fp8(const Tensor& x, const Tensor& packed, const Tensor& scale,
                        const Tensor& sorted_rows, const Tensor& offsets, int64_t rows_per_token,
                        const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&packed, &scale, &sorted_rows, &offsets, &out});
    run_grouped(x, {WeightFormat::kFp8, view(packed), view(scale), {}, 0}, sorted_rows, offsets,
                rows_per_token, out);
  });
}

void grouped_linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scale,
                         const Tensor& sorted_rows, const Tensor& offsets, int64_t rows_per_token,
                         const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&packed, &scale, &sorted_rows, &offsets, &out});
    run_grouped(x, {WeightFormat::kInt8, view(packed), view(scale), {}, 0}, sorted_rows, offsets,
                rows_per_token, out);
  });
}

void grouped_linear_int4(const Tensor& x, const Tensor& packed, const Tensor& scale,
                         const OptionalTensor& zero_point, int64_t group_size,
                         const Tensor& sorted_rows, const Tensor& offsets, int64_t rows_per_token,
                         const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&packed, &scale, pointer(zero_point), &sorted_rows, &offsets, &out});
    run_grouped(x,
                {WeightFormat::kInt4, view(packed), view(scale), view(zero_point), int(group_size)},
                sorted_rows, offsets, rows_per_token, out);
  });
}

void batched_linear(const Tensor& x, const Tensor& weight, const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&weight, &out});
    gemm::batched_linear({view(x), view(weight), view(out)}, stream_of(x));
  });
}

WeightFormat format_of(const std::string& name) {
  if (name == "fp8") return WeightFormat::kFp8;
  if (name == "int8") return WeightFormat::kInt8;
  if (name == "int4") return WeightFormat::kInt4;
  FASTGPT_CHECK(name == "dense", "format is '", name, "'; expected dense, fp8, int8 or int4");
  return WeightFormat::kDense;
}

void arrange_weight(const Tensor& weight, const OptionalTensor& scale,
                    const OptionalTensor& zero_point, const std::string& format,
                    int64_t in_features, int64_t group_size, const Tensor& out_packed,
                    const OptionalTensor& out_scale, const OptionalTensor& out_zero_point) {
  guarded([&] {
    check_same_device(weight, {pointer(scale), pointer(zero_point), &out_packed, pointer(out_scale),
                               pointer(out_zero_point)});
    gemm::arrange_weight(
        {format_of(format), view(weight), view(scale), view(zero_point), in_features,
         int(group_size), view(out_packed), view(out_scale), view(out_zero_point)},
        stream_of(weight));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("linear_fp8(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("linear_int8(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor(a!) out) -> ()");
  m.def(
      "linear_int4(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, int group_size, "
      "Tensor? bias, Tensor(a!) out) -> ()");
  m.def(
      "grouped_linear(Tensor x, Tensor weight, Tensor sorted_rows, Tensor offsets, "
      "int rows_per_token, Tensor(a!) out) -> ()");
  m.def(
      "grouped_linear_fp8(Tensor x, Tensor packed, Tensor scale, Tensor sorted_rows, "
      "Tensor offsets, int rows_per_token, Tensor(a!) out) -> ()");
  m.def(
      "grouped_linear_int8(Tensor x, Tensor packed, Tensor scale, Tensor sorted_rows, "
      "Tensor offsets, int rows_per_token, Tensor(a!) out) -> ()");
  m.def(
      "grouped_linear_int4(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, "
      "int group_size, Tensor sorted_rows, Tensor offsets, int rows_per_token, Tensor(a!) out) "
      "-> ()");
  m.def("batched_linear(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
  m.def(
      "arrange_weight(Tensor weight, Tensor? scale, Tensor? zero_point, str format, "
      "int in_features, int group_size, Tensor(a!) out_packed, Tensor(b!)? out_scale, "
      "Tensor(c!)? out_zero_point) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_fp8", TORCH_BOX(&linear_fp8));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_int4", TORCH_BOX(&linear_int4));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("grouped_linear_fp8", TORCH_BOX(&grouped_linear_fp8));
  m.impl("grouped_linear_int8", TORCH_BOX(&grouped_linear_int8));
  m.impl("grouped_linear_int4", TORCH_BOX(&grouped_linear_int4));
  m.impl("batched_linear", TORCH_BOX(&batched_linear));
  m.impl("arrange_weight", TORCH_BOX(&arrange_weight));
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_fp8", TORCH_BOX(&linear_fp8));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_int4", TORCH_BOX(&linear_int4));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("grouped_linear_fp8", TORCH_BOX(&grouped_linear_fp8));
  m.impl("grouped_linear_int8", TORCH_BOX(&grouped_linear_int8));
  m.impl("grouped_linear_int4", TORCH_BOX(&grouped_linear_int4));
  m.impl("batched_linear", TORCH_BOX(&batched_linear));
  m.impl("arrange_weight", TORCH_BOX(&arrange_weight));
}

}  // namespace fastgpt::bindings
