// The parts of fastgpt._C, one function a file.
#pragma once
#include <pybind11/pybind11.h>

#include <exception>

namespace fastgpt::bindings {

/// Our C++ errors become the Python errors of the same name.
void translate_errors(std::exception_ptr error);

void bind_core(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_fake(pybind11::module_& m);

}  // namespace fastgpt::bindings
