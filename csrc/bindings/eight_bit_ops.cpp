#include "bindings/stable.h"
#include "fastgpt/eight_bit.h"

namespace fastgpt::bindings {
namespace {

using OptionalTensor = std::optional<Tensor>;
using gemm::WeightFormat;

void quantize_rows(const Tensor& x, const Tensor& codes, const Tensor& scale) {
  guarded([&] {
    check_same_device(x, {&codes, &scale});
    gemm::quantize_rows({view(x), view(codes), view(scale)}, stream_of(x));
  });
}

void run_linear(WeightFormat format, const Tensor& codes, const Tensor& scale, int64_t in_features,
                const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias,
                const Tensor& out) {
  guarded([&] {
    check_same_device(codes, {&scale, &packed, &weight_scale, bias ? &*bias : nullptr, &out});
    gemm::linear_eight_bit({view(codes),
                            view(scale),
                            in_features,
                            {format, view(packed), view(weight_scale), {}, 0},
                            view(bias),
                            view(out)},
                           stream_of(codes));
  });
}

void linear_fp8_fp8(const Tensor& codes, const Tensor& scale, int64_t in_features,
                    const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias,
                    const Tensor& out) {
  run_linear(WeightFormat::kFp8, codes, scale, in_features, packed, weight_scale, bias, out);
}

void linear_int8_int8(const Tensor& codes, const Tensor& scale, int64_t in_features,
                      const Tensor& packed, const Tensor& weight_scale, const OptionalTensor& bias,
                      const Tensor& out) {
  run_linear(WeightFormat::kInt8, codes, scale, in_features, packed, weight_scale, bias, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) {
  m.def("quantize_rows(Tensor x, Tensor(a!) codes, Tensor(b!) scale) -> ()");
  m.def(
      "linear_fp8_fp8(Tensor codes, Tensor scale, int in_features, Tensor packed, "
      "Tensor weight_scale, Tensor? bias, Tensor(a!) out) -> ()");
  m.def(
      "linear_int8_int8(Tensor codes, Tensor scale, int in_features, Tensor packed, "
      "Tensor weight_scale, Tensor? bias, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("linear_fp8_fp8", TORCH_BOX(&linear_fp8_fp8));
  m.impl("linear_int8_int8", TORCH_BOX(&linear_int8_int8));
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("linear_fp8_fp8", TORCH_BOX(&linear_fp8_fp8));
  m.impl("linear_int8_int8", TORCH_BOX(&linear_int8_int8));
}

}  // namespace fastgpt::bindings
