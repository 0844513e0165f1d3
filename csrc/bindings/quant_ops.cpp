#include "bindings/stable.h"
#include "fastgpt/quant.h"

namespace fastgpt::bindings {
namespace {

using quant::BinaryParams;
using quant::Fp8Params;
using quant::Int4Params;
using quant::Int8Params;

template <void (*op)(const Fp8Params&, const Stream&)>
void run_fp8(const Tensor& x, const Tensor& packed, const Tensor& scale) {
  guarded([&] {
    check_same_device(x, {&packed, &scale});
    op({view(x), view(packed), view(scale)}, stream_of(x));
  });
}

template <void (*op)(const Int8Params&, const Stream&)>
void run_int8(const Tensor& x, const Tensor& packed, const Tensor& scale) {
  guarded([&] {
    check_same_device(x, {&packed, &scale});
    op({view(x), view(packed), view(scale)}, stream_of(x));
  });
}

template <void (*op)(const Int4Params&, const Stream&)>
void run_int4(const Tensor& x, const Tensor& packed, const Tensor& scale,
              const std::optional<Tensor>& zero_point, int64_t group_size) {
  guarded([&] {
    check_same_device(x, {&packed, &scale, zero_point ? &*zero_point : nullptr});
    op({view(x), view(packed), view(scale), view(zero_point), int(group_size)}, stream_of(x));
  });
}

template <void (*op)(const BinaryParams&, const Stream&)>
void run_binary(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& offset) {
  guarded([&] {
    check_same_device(x, {&packed, &scale, &offset});
    op({view(x), view(packed), view(scale), view(offset)}, stream_of(x));
  });
}

void quantize_fp8(const Tensor& x, const Tensor& packed, const Tensor& scale) {
  run_fp8<quant::quantize_fp8>(x, packed, scale);
}

void dequantize_fp8(const Tensor& packed, const Tensor& scale, const Tensor& out) {
  run_fp8<quant::dequantize_fp8>(out, packed, scale);
}

void quantize_int8(const Tensor& x, const Tensor& packed, const Tensor& scale) {
  run_int8<quant::quantize_int8>(x, packed, scale);
}

void dequantize_int8(const Tensor& packed, const Tensor& scale, const Tensor& out) {
  run_int8<quant::dequantize_int8>(out, packed, scale);
}

void quantize_int4(const Tensor& x, int64_t group_size, const Tensor& packed, const Tensor& scale,
                   const std::optional<Tensor>& zero_point) {
  run_int4<quant::quantize_int4>(x, packed, scale, zero_point, group_size);
}

void dequantize_int4(const Tensor& packed, const Tensor& scale,
                     const std::optional<Tensor>& zero_point, int64_t group_size,
                     const Tensor& out) {
  run_int4<quant::dequantize_int4>(out, packed, scale, zero_point, group_size);
}

void quantize_binary(const Tensor& x, const Tensor& packed, const Tensor& scale,
                     const Tensor& offset) {
  run_binary<quant::quantize_binary>(x, packed, scale, offset);
}

void dequantize_binary(const Tensor& packed, const Tensor& scale, const Tensor& offset,
                       const Tensor& out) {
  run_binary<quant::dequantize_binary>(out, packed, scale, offset);
}

void gptq_round(const Tensor& left, const Tensor& scale, const Tensor& zero, const Tensor& spread,
                int64_t top, const Tensor& codes, const Tensor& errors) {
  guarded([&] {
    check_same_device(left, {&scale, &zero, &spread, &codes, &errors});
    quant::gptq_round(
        {view(left), view(scale), view(zero), view(spread), view(codes), view(errors), int(top)},
        stream_of(left));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) {
  m.def(
      "gptq_round(Tensor left, Tensor scale, Tensor zero, Tensor spread, int top, "
      "Tensor(a!) codes, Tensor(b!) errors) -> ()");
  m.def("quantize_fp8(Tensor x, Tensor(a!) packed, Tensor(b!) scale) -> ()");
  m.def("dequantize_fp8(Tensor packed, Tensor scale, Tensor(a!) out) -> ()");
  m.def("quantize_int8(Tensor x, Tensor(a!) packed, Tensor(b!) scale) -> ()");
  m.def("dequantize_int8(Tensor packed, Tensor scale, Tensor(a!) out) -> ()");
  m.def(
      "quantize_int4(Tensor x, int group_size, Tensor(a!) packed, Tensor(b!) scale, "
      "Tensor(c!)? zero_point) -> ()");
  m.def(
      "dequantize_int4(Tensor packed, Tensor scale, Tensor? zero_point, int group_size, "
      "Tensor(a!) out) -> ()");
  m.def("quantize_binary(Tensor x, Tensor(a!) packed, Tensor(b!) scale, Tensor(c!) offset) -> ()");
  m.def("dequantize_binary(Tensor packed, Tensor scale, Tensor offset, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8));
  m.impl("dequantize_fp8", TORCH_BOX(&dequantize_fp8));
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  m.impl("dequantize_int8", TORCH_BOX(&dequantize_int8));
  m.impl("quantize_int4", TORCH_BOX(&quantize_int4));
  m.impl("dequantize_int4", TORCH_BOX(&dequantize_int4));
  m.impl("quantize_binary", TORCH_BOX(&quantize_binary));
  m.impl("dequantize_binary", TORCH_BOX(&dequantize_binary));
  m.impl("gptq_round", TORCH_BOX(&gptq_round));
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8));
  m.impl("dequantize_fp8", TORCH_BOX(&dequantize_fp8));
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  m.impl("dequantize_int8", TORCH_BOX(&dequantize_int8));
  m.impl("quantize_int4", TORCH_BOX(&quantize_int4));
  m.impl("dequantize_int4", TORCH_BOX(&dequantize_int4));
  m.impl("quantize_binary", TORCH_BOX(&quantize_binary));
  m.impl("dequantize_binary", TORCH_BOX(&dequantize_binary));
  m.impl("gptq_round", TORCH_BOX(&gptq_round));
}

}  // namespace fastgpt::bindings
