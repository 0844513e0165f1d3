#include "fastgpt/isa_table.h"
#include "fastgpt/thread_pool.h"
#include "moe/combine.h"
#include "moe/kernels.h"

namespace fastgpt::moe {
namespace {

constexpr std::int64_t kGrainElements = 65536;  // below this a thread costs more than it saves

char* row_of(const TensorView& view, std::int64_t row) {
  return view.as<char>() + row * view.stride(0) * dtype_bytes(view.dtype);
}

}  // namespace

void moe_combine_cpu(const MoeCombineParams& p) {
  const std::int64_t work = p.out.size(1) * (p.y.size(1) + 1);
  const Combine combine = table_of_isa(&combine_portable, &combine_avx2, &combine_avx512);
  parallel_for(0, p.out.size(0), 1 + kGrainElements / work, [&](std::int64_t a, std::int64_t b) {
    for (std::int64_t i = a; i < b; ++i) {
      combine({row_of(p.y, i), p.y.dtype, p.y.stride(1), p.y.size(1), p.out.size(1),
               p.weights.as<float>() + i * p.weights.stride(0),
               p.shared ? row_of(p.shared, i) : nullptr, row_of(p.out, i), p.out.dtype});
    }
  });
}

}  // namespace fastgpt::moe
