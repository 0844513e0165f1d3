// What both operations that store keys and values ask of their arguments.
#pragma once
#include "fastgpt/kv_cache.h"

namespace fastgpt::kv_cache {

/// @throws InvalidArgument if shapes, dtypes or strides do not fit.
void check_write_kv(const WriteKvParams& params);

}  // namespace fastgpt::kv_cache
