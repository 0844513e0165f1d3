// The Python classes and process-wide settings of the core: thin, no torch headers.
#include "bindings/module.h"

#include "fastgpt/attention.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native classes of FastGPT.";
  py::register_local_exception_translator(&fastgpt::bindings::translate_errors);
  fastgpt::bindings::bind_core(m);
  m.def(
      "attention_workspace_bytes",
      [](std::int64_t num_tokens, std::int64_t num_heads, std::int64_t head_dim_v,
         std::int64_t max_seq_len, bool is_cuda) {
        return fastgpt::attention::attention_workspace_bytes(
            num_tokens, num_heads, head_dim_v, max_seq_len,
            is_cuda ? fastgpt::DeviceType::kCUDA : fastgpt::DeviceType::kCPU);
      },
      py::arg("num_tokens"), py::arg("num_heads"), py::arg("head_dim_v"), py::arg("max_seq_len"),
      py::arg("is_cuda"));
  m.def(
      "cuda_architectures", [] { return FASTGPT_CUDA_ARCHS; },
      "Architectures of the CUDA kernels in this build, oldest first; empty without CUDA.");
  fastgpt::bindings::bind_memory(m);
  fastgpt::bindings::bind_fake(m);
}
