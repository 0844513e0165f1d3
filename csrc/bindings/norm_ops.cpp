#include "bindings/stable.h"
#include "fastgpt/norm.h"

namespace fastgpt::bindings {
namespace {

void rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, const Tensor& out) {
  guarded([&] {
    check_same_device(x, {weight ? &*weight : nullptr, &out});
    norm::rms_norm({view(x), view(weight), view(out), float(eps)}, stream_of(x));
  });
}

void add_rms_norm(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight,
                  double eps, const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&residual, weight ? &*weight : nullptr, &out});
    norm::add_rms_norm({view(x), view(residual), view(weight), view(out), float(eps)},
                       stream_of(x));
  });
}

void rotary(const Tensor& positions, const Tensor& cos_sin, const Tensor& q,
            const std::optional<Tensor>& k, bool interleaved) {
  guarded([&] {
    check_same_device(q, {&positions, &cos_sin, k ? &*k : nullptr});
    norm::rotary({view(positions), view(cos_sin), view(q), view(k), interleaved}, stream_of(q));
  });
}

void silu_mul(const Tensor& x, const Tensor& out) {
  guarded([&] {
    check_same_device(x, {&out});
    norm::silu_mul({view(x), view(out)}, stream_of(x));
  });
}

void embedding(const Tensor& ids, const Tensor& weight, const Tensor& out) {
  guarded([&] {
    check_same_device(weight, {&ids, &out});
    norm::embedding({view(ids), view(weight), view(out)}, stream_of(weight));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, Tensor(a!) out) -> ()");
  m.def(
      "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor? weight, float eps, Tensor(b!) out) "
      "-> ()");
  m.def(
      "rotary(Tensor positions, Tensor cos_sin, Tensor(a!) q, Tensor(b!)? k, bool interleaved) "
      "-> ()");
  m.def("silu_mul(Tensor x, Tensor(a!) out) -> ()");
  m.def("embedding(Tensor ids, Tensor weight, Tensor(a!) out) -> ()");
}

#define FASTGPT_NORM_OPS(m)                         \
  m.impl("rms_norm", TORCH_BOX(&rms_norm));         \
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm)); \
  m.impl("rotary", TORCH_BOX(&rotary));             \
  m.impl("silu_mul", TORCH_BOX(&silu_mul));         \
  m.impl("embedding", TORCH_BOX(&embedding));

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m){FASTGPT_NORM_OPS(m)}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  FASTGPT_NORM_OPS(m)
}

}  // namespace fastgpt::bindings
