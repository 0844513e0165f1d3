// The sum of one token, included by one combine_<isa>.cpp each: over the experts in order, the
// shared result last, a vector of columns at a time.
#pragma once
#include "fastgpt/simd.h"
#include "moe/combine.h"

namespace fastgpt::moe {
namespace {

using namespace simd;

void combine(const CombineRow& row) {
  with_float(row.dtype, [&](auto tag) {
    with_float(row.out_dtype, [&](auto out_tag) {
      using T = decltype(tag);
      using O = decltype(out_tag);
      const T* shared = static_cast<const T*>(row.shared);
      for_each_run(row.hidden, [&](std::int64_t i, int n) {
        Vec sum = set1(0.0F);
        for (std::int64_t j = 0; j < row.top_k; ++j) {
          const T* y = static_cast<const T*>(row.y) + j * row.y_stride + i;
          sum = fma(set1(row.weights[j]), load_run(y, n), sum);
        }
        if (shared != nullptr) sum = sum + load_run(shared + i, n);
        store_run(static_cast<O*>(row.out) + i, sum, n);
      });
    });
  });
}

}  // namespace
}  // namespace fastgpt::moe
