// Process-wide settings of the CPU kernels and the shapes of arranged weights.
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings/module.h"
#include "fastgpt/check.h"
#include "fastgpt/cpu_isa.h"
#include "fastgpt/eight_bit.h"
#include "fastgpt/gemm.h"
#include "fastgpt/launch_scope.h"
#include "fastgpt/thread_pool.h"

namespace py = pybind11;

namespace fastgpt::bindings {
namespace {

void set_cpu_isa_by_name(const std::string& name) {
  for (const CpuIsa isa : {CpuIsa::kPortable, CpuIsa::kAVX2, CpuIsa::kAVX512}) {
    if (name == cpu_isa_name(isa)) return set_cpu_isa(isa);
  }
  FASTGPT_CHECK(false, "cpu_isa is '", name, "'; expected portable, avx2 or avx512");
}

using Shape = std::vector<std::int64_t>;

std::tuple<Shape, Shape, Shape> arranged_shape(const std::string& device_type,
                                               const std::string& format, std::int64_t n,
                                               std::int64_t k, int group_size) {
  FASTGPT_CHECK(device_type == "cpu" || device_type == "cuda", "the weight is on '", device_type,
                "'; expected cpu or cuda");
  const gemm::WeightFormat weight_format = format == "fp8"    ? gemm::WeightFormat::kFp8
                                           : format == "int8" ? gemm::WeightFormat::kInt8
                                           : format == "int4" ? gemm::WeightFormat::kInt4
                                                              : gemm::WeightFormat::kDense;
  const gemm::ArrangedShape shape =
      gemm::arranged_shape(device_type == "cuda" ? DeviceType::kCUDA : DeviceType::kCPU,
                           weight_format, n, k, group_size);
  return {shape.packed, shape.scale, shape.zero_point};
}

bool has_eight_bit_product(const std::string& format, int cuda_device) {
  FASTGPT_CHECK(format == "fp8" || format == "int8", "format is '", format,
                "'; expected fp8 or int8");
  const auto weight_format = format == "fp8" ? gemm::WeightFormat::kFp8 : gemm::WeightFormat::kInt8;
  const DeviceType device_type = cuda_device < 0 ? DeviceType::kCPU : DeviceType::kCUDA;
  return gemm::has_eight_bit_product(weight_format, {device_type, cuda_device, nullptr});
}

}  // namespace

void bind_core(py::module_& m) {
  m.def("set_num_threads", &set_num_threads, py::arg("num_threads"));
  m.def("num_threads", &num_threads);
  m.def("set_cpu_isa", &set_cpu_isa_by_name, py::arg("name"));
  m.def("cpu_isa", [] { return std::string(cpu_isa_name(cpu_isa())); });
  m.def("has_avx512_bf16", &has_avx512_bf16);
  m.def("use_bf16_dot", &use_bf16_dot);
  m.def("set_bf16_dot", &set_bf16_dot, py::arg("use"));
  m.def("set_overlap_launches", &set_overlap_launches, py::arg("overlap"));
  m.def("overlap_launches", &overlap_launches);
  m.def("arranged_shape", &arranged_shape, py::arg("device_type"), py::arg("format"), py::arg("n"),
        py::arg("k"), py::arg("group_size"));
  m.def("has_eight_bit_product", &has_eight_bit_product, py::arg("format"), py::arg("cuda_device"));
}

}  // namespace fastgpt::bindings
