// Element types of device code and their conversions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fastgpt/check.h"
#include "fastgpt/tensor_view.h"

namespace fastgpt::device {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Host side: call fn with a value of float, __half or __nv_bfloat16.
template <class Fn>
void dispatch_float(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(float{});
    case DType::kF16:
      return fn(__half{});
    case DType::kBF16:
      return fn(__nv_bfloat16{});
    default:
      FASTGPT_CHECK(false, "dtype is ", dtype_name(dtype),
                    "; expected float32, float16 or bfloat16");
  }
}

}  // namespace fastgpt::device
