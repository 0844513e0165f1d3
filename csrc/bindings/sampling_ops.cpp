#include "bindings/stable.h"
#include "fastgpt/sampling.h"

namespace fastgpt::bindings {
namespace {

void sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& min_p, const Tensor& seeds, const Tensor& positions,
            const Tensor& ids) {
  guarded([&] {
    check_same_device(logits, {&temperature, &top_k, &top_p, &min_p, &seeds, &positions, &ids});
    sampling::sample({view(logits), view(temperature), view(top_k), view(top_p), view(min_p),
                      view(seeds), view(positions), view(ids)},
                     stream_of(logits));
  });
}

void penalize(const Tensor& logits, const Tensor& history, const Tensor& slots,
              const Tensor& repetition, const Tensor& presence, const Tensor& frequency) {
  guarded([&] {
    check_same_device(logits, {&history, &slots, &repetition, &presence, &frequency});
    sampling::penalize({view(logits), view(history), view(slots), view(repetition), view(presence),
                        view(frequency)},
                       stream_of(logits));
  });
}

void record_tokens(const Tensor& history, const Tensor& slots, const Tensor& ids, bool is_prompt) {
  guarded([&] {
    check_same_device(history, {&slots, &ids});
    sampling::record_tokens({view(history), view(slots), view(ids), is_prompt}, stream_of(history));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) {
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
      "Tensor seeds, Tensor positions, Tensor(a!) ids) -> ()");
  m.def(
      "penalize(Tensor(a!) logits, Tensor history, Tensor slots, Tensor repetition, "
      "Tensor presence, Tensor frequency) -> ()");
  m.def("record_tokens(Tensor(a!) history, Tensor slots, Tensor ids, bool is_prompt) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("penalize", TORCH_BOX(&penalize));
  m.impl("record_tokens", TORCH_BOX(&record_tokens));
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("penalize", TORCH_BOX(&penalize));
  m.impl("record_tokens", TORCH_BOX(&record_tokens));
}

}  // namespace fastgpt::bindings
