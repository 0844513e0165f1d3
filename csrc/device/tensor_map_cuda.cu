#include <algorithm>

#include "device/bulk.cuh"
#include "fastgpt/check.h"

namespace fastgpt::device {
namespace {

// The driver's function, found through the runtime: the library does not link libcuda.
decltype(&cuTensorMapEncodeTiled) encode_function() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    FASTGPT_CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                      cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
      detail::fail<DeviceError>(__FILE__, __LINE__, "the NVIDIA driver has no ",
                                "cuTensorMapEncodeTiled; install driver 580 or newer");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

}  // namespace

CUtensorMap tensor_map(const void* data, bool is_float16, std::int64_t batches, std::int64_t rows,
                       std::int64_t columns, std::int64_t batch_stride, std::int64_t row_stride,
                       int box_rows) {
  const cuuint64_t sizes[3] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(batches)};
  // Strides of dimensions of size 1 mean nothing, but must look like strides.
  const cuuint64_t strides[2] = {cuuint64_t(std::max<std::int64_t>(row_stride, 16)),
                                 cuuint64_t(std::max<std::int64_t>(batch_stride, 16))};
  const cuuint32_t box[3] = {64, cuuint32_t(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map{};
  const CUresult status = encode_function()(
      &map, is_float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    detail::fail<DeviceError>(__FILE__, __LINE__, "cuTensorMapEncodeTiled failed: CUresult ",
                              int(status), " for [", batches, ", ", rows, ", ", columns,
                              "] with strides of ", batch_stride, " and ", row_stride, " bytes");
  }
  return map;
}

CUtensorMap tensor_map(const void* data, bool is_float16, const std::int64_t (&sizes)[5],
                       const std::int64_t (&strides)[4], int box_rows) {
  cuuint64_t extents[5];
  cuuint64_t steps_bytes[4];
  for (int i = 0; i < 5; ++i) extents[i] = cuuint64_t(sizes[i]);
  for (int i = 0; i < 4; ++i) steps_bytes[i] = sizes[i + 1] == 1 ? 16 : cuuint64_t(strides[i]);
  const cuuint32_t box[5] = {64, cuuint32_t(box_rows), 1, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult status = encode_function()(
      &map, is_float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
      const_cast<void*>(data), extents, steps_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    detail::fail<DeviceError>(__FILE__, __LINE__, "cuTensorMapEncodeTiled failed: CUresult ",
                              int(status), " for sizes ", sizes[0], ", ", sizes[1], ", ", sizes[2],
                              ", ", sizes[3], ", ", sizes[4], " with strides of ", strides[0], ", ",
                              strides[1], ", ", strides[2], ", ", strides[3], " bytes");
  }
  return map;
}

}  // namespace fastgpt::device
