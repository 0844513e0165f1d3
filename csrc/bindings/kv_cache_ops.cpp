#include "bindings/stable.h"
#include "fastgpt/kv_cache.h"

namespace fastgpt::bindings {
namespace {

void write_kv(const Tensor& k, const Tensor& v, const Tensor& slot_mapping, const Tensor& kv_cache,
              const std::optional<Tensor>& kv_scale) {
  guarded([&] {
    check_same_device(k, {&v, &slot_mapping, &kv_cache, pointer(kv_scale)});
    kv_cache::write_kv({view(k), view(v), view(slot_mapping), view(kv_cache), view(kv_scale)},
                       stream_of(k));
  });
}

void rotary_write_kv(const Tensor& positions, const Tensor& cos_sin, const Tensor& q,
                     const Tensor& k, const Tensor& v, const Tensor& slot_mapping,
                     const Tensor& kv_cache, bool interleaved,
                     const std::optional<Tensor>& kv_scale) {
  guarded([&] {
    check_same_device(q,
                      {&positions, &cos_sin, &k, &v, &slot_mapping, &kv_cache, pointer(kv_scale)});
    kv_cache::rotary_write_kv({view(positions), view(cos_sin), view(q), view(k), view(v),
                               view(slot_mapping), view(kv_cache), view(kv_scale), interleaved},
                              stream_of(q));
  });
}

void write_mla(const Tensor& kv_latent, const Tensor& k_pe, const Tensor& slot_mapping,
               const Tensor& kv_cache, const std::optional<Tensor>& kv_scale,
               const std::optional<Tensor>& pe_cache) {
  guarded([&] {
    check_same_device(kv_latent,
                      {&k_pe, &slot_mapping, &kv_cache, pointer(kv_scale), pointer(pe_cache)});
    kv_cache::write_mla({view(kv_latent), view(k_pe), view(slot_mapping), view(kv_cache),
                         view(kv_scale), view(pe_cache)},
                        stream_of(kv_latent));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) {
  m.def(
      "write_kv(Tensor k, Tensor v, Tensor slot_mapping, Tensor(a!) kv_cache, "
      "Tensor(b!)? kv_scale=None) -> ()");
  m.def(
      "rotary_write_kv(Tensor positions, Tensor cos_sin, Tensor(a!) q, Tensor(b!) k, Tensor v, "
      "Tensor slot_mapping, Tensor(c!) kv_cache, bool interleaved, Tensor(d!)? kv_scale=None) "
      "-> ()");
  m.def(
      "write_mla(Tensor kv_latent, Tensor k_pe, Tensor slot_mapping, Tensor(a!) kv_cache, "
      "Tensor(b!)? kv_scale=None, Tensor(c!)? pe_cache=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("write_kv", TORCH_BOX(&write_kv));
  m.impl("rotary_write_kv", TORCH_BOX(&rotary_write_kv));
  m.impl("write_mla", TORCH_BOX(&write_mla));
}

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("write_kv", TORCH_BOX(&write_kv));
  m.impl("rotary_write_kv", TORCH_BOX(&rotary_write_kv));
  m.impl("write_mla", TORCH_BOX(&write_mla));
}

}  // namespace fastgpt::bindings
