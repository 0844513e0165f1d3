// Error types and the check macros. Everything in csrc/ reports failure through this file.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastgpt {

/// Base of the failures that are not the caller's fault.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// The caller passed something wrong.
struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
/// Capacity; recoverable by freeing or preempting.
struct OutOfMemory : Error {
  using Error::Error;
};
/// The device or its driver reported a failure; not recoverable in this process.
struct DeviceError : Error {
  using Error::Error;
};

namespace detail {

constexpr const char* source_name(const char* path) {
  const char* name = path;
  for (const char* p = path; *p != '\0'; ++p) {
    if (*p == '/') name = p + 1;
  }
  return name;
}

template <class E, class... Args>
[[noreturn]] void fail(const char* file, int line, const Args&... args) {
  std::ostringstream os;
  (os << ... << args);
  os << " (" << source_name(file) << ':' << line << ')';
  throw E(os.str());
}

}  // namespace detail
}  // namespace fastgpt

// FASTGPT_CHECK(cond, parts...): validate an argument. State the name, the value and what is
// allowed.
#define FASTGPT_CHECK(cond, ...) \
  ((cond) ? void(0)              \
          : ::fastgpt::detail::fail<::fastgpt::InvalidArgument>(__FILE__, __LINE__, __VA_ARGS__))

// FASTGPT_CUDA_TRY(call): if a CUDA call fails, reset the last-error flag and throw DeviceError.
#define FASTGPT_CUDA_TRY(call)                                                                   \
  do {                                                                                           \
    if (const cudaError_t err_ = (call); err_ != cudaSuccess) {                                  \
      (void)cudaGetLastError();                                                                  \
      ::fastgpt::detail::fail<::fastgpt::DeviceError>(__FILE__, __LINE__, #call,                 \
                                                      " failed: ", cudaGetErrorName(err_), ", ", \
                                                      cudaGetErrorString(err_));                 \
    }                                                                                            \
  } while (0)
