// The parts of fastgpt._C, one function a file.
#pragma once
#include <pybind11/pybind11.h>

namespace fastgpt::bindings {

void bind_core(pybind11::module_& m);
void bind_memory(pybind11::module_& m);

}  // namespace fastgpt::bindings
