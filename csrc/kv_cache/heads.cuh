// Rows of queries, keys or values as the kernels that store them see them.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fastgpt/tensor_view.h"

namespace fastgpt::kv_cache {

struct Heads {
  void* data;
  std::int64_t token_stride;
  std::int64_t head_stride;
  int num_heads;
  int width;
};

template <class T>
__device__ T* head_row(const Heads& heads, std::int64_t token, int head) {
  return static_cast<T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
}

inline Heads heads_of(const TensorView& view) {
  return {view.data, view.stride(0), view.stride(1), int(view.size(1)), int(view.size(2))};
}

}  // namespace fastgpt::kv_cache
