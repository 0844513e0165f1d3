#include <algorithm>

#include "device/blobs.cuh"
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

// strides[i] is that of dimension i + 1, in bytes; it means nothing where the size is 1, but must
// look like a stride.
template <int kRank>
CUtensorMap encode(const void* data, CUtensorMapDataType type, CUtensorMapSwizzle swizzle,
                   const std::int64_t (&sizes)[kRank], const std::int64_t (&strides)[kRank - 1],
                   const int (&box)[kRank]) {
  cuuint64_t extents[kRank];
  cuuint64_t step_bytes[kRank - 1];
  cuuint32_t boxes[kRank];
  cuuint32_t steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    extents[i] = cuuint64_t(sizes[i]);
    boxes[i] = cuuint32_t(box[i]);
    steps[i] = 1;
    if (i > 0) step_bytes[i - 1] = sizes[i] == 1 ? 16 : cuuint64_t(strides[i - 1]);
  }
  CUtensorMap map{};
  const CUresult status =
      encode_function()(&map, type, kRank, const_cast<void*>(data), extents, step_bytes, boxes,
                        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::ostringstream shape;
    for (int i = 0; i < kRank; ++i) {
      shape << (i == 0 ? "" : ", ") << sizes[i];
      if (i > 0) shape << " (" << strides[i - 1] << " bytes apart)";
    }
    detail::fail<DeviceError>(__FILE__, __LINE__, "cuTensorMapEncodeTiled failed: CUresult ",
                              int(status), " for sizes ", shape.str());
  }
  return map;
}

CUtensorMapDataType half_type(bool is_float16) {
  return is_float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

}  // namespace

CUtensorMap tensor_map(const void* data, bool is_float16, std::int64_t batches, std::int64_t rows,
                       std::int64_t columns, std::int64_t batch_stride, std::int64_t row_stride,
                       int box_rows) {
  return encode<3>(data, half_type(is_float16), CU_TENSOR_MAP_SWIZZLE_128B,
                   {columns, rows, batches}, {row_stride, batch_stride}, {64, box_rows, 1});
}

CUtensorMap tensor_map(const void* data, bool is_float16, const std::int64_t (&sizes)[5],
                       const std::int64_t (&strides)[4], int box_rows) {
  return encode<5>(data, half_type(is_float16), CU_TENSOR_MAP_SWIZZLE_128B, sizes, strides,
                   {64, box_rows, 1, 1, 1});
}

CUtensorMap word_map(const void* data, std::int64_t batches, std::int64_t tiles,
                     std::int64_t blocks, int words, std::int64_t batch_stride, int box_tiles,
                     int box_blocks, bool swizzled) {
  return encode<4>(data, CU_TENSOR_MAP_DATA_TYPE_UINT32,
                   swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                   {words, blocks, tiles, batches}, {words * 4, blocks * words * 4, batch_stride},
                   {words, box_blocks, box_tiles, 1});
}

CUtensorMap blob_map(const void* data, std::int64_t tiles, std::int64_t blobs,
                     std::int64_t tile_stride, int box_tiles) {
  return encode<4>(data, CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_64B,
                   {64, 16, blobs, tiles}, {64, 16 * 64, tile_stride}, {64, 16, 1, box_tiles});
}

}  // namespace fastgpt::device
