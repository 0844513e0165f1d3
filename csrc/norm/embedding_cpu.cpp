#include <cstring>
#include <type_traits>

#include "fastgpt/dispatch.h"
#include "fastgpt/thread_pool.h"
#include "norm/kernels.h"

namespace fastgpt::norm {
namespace {

constexpr std::int64_t kGrainElements = 16384;  // below this a thread costs more than it saves

template <class W, class T>
void copy_row(const W* row, T* out, std::int64_t hidden) {
  if constexpr (std::is_same_v<W, T>) {
    std::memcpy(out, row, std::size_t(hidden) * sizeof(T));
  } else {
    for (std::int64_t i = 0; i < hidden; ++i) out[i] = from_float<T>(to_float(row[i]));
  }
}

}  // namespace

void embedding_cpu(const EmbeddingParams& p) {
  const std::int64_t num_tokens = p.out.size(0);
  const std::int64_t hidden = p.out.size(1);
  const std::int64_t* ids = p.ids.as<std::int64_t>();
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    FASTGPT_CHECK(ids[i] >= 0 && ids[i] < p.weight.size(0), "ids[", i, "] is ", ids[i],
                  "; the vocabulary has ", p.weight.size(0), " tokens");
  }
  dispatch_float(p.weight.dtype, [&](auto weight_tag) {
    dispatch_float(p.out.dtype, [&](auto out_tag) {
      using W = decltype(weight_tag);
      using T = decltype(out_tag);
      parallel_for(0, num_tokens, 1 + kGrainElements / hidden, [&](std::int64_t a, std::int64_t b) {
        for (std::int64_t i = a; i < b; ++i) {
          copy_row(p.weight.as<W>() + ids[i] * p.weight.stride(0),
                   p.out.as<T>() + i * p.out.stride(0), hidden);
        }
      });
    });
  });
}

}  // namespace fastgpt::norm
