#include "bindings/module.h"
#include "fastgpt/check.h"

namespace py = pybind11;

namespace fastgpt::bindings {

void translate_errors(std::exception_ptr error) {
  const auto raise = [](const char* name, const char* text) {
    const py::object type = py::module_::import("fastgpt.errors").attr(name);
    PyErr_SetString(type.ptr(), text);
  };
  try {
    if (error) std::rethrow_exception(error);
  } catch (const InvalidArgument& e) {
    raise("InvalidArgument", e.what());
  } catch (const OutOfMemory& e) {
    raise("OutOfMemory", e.what());
  } catch (const DeviceError& e) {
    raise("DeviceError", e.what());
  }
}

}  // namespace fastgpt::bindings
