#include "fastgpt/thread_pool.h"
#include "norm/kernels.h"
#include "norm/rows.h"

namespace fastgpt::norm {
namespace {

constexpr std::int64_t kGrainElements = 65536;  // below this a thread costs more than it saves

char* row_of(const TensorView& view, std::int64_t offset) {
  return view.as<char>() + offset * dtype_bytes(view.dtype);
}

}  // namespace

void rms_norm_cpu(const RmsNormParams& p) {
  const std::int64_t hidden = p.x.size(-1);
  const bool has_heads = p.x.ndim == 3;
  const std::int64_t inner = has_heads ? p.x.size(1) : 1;
  const auto run = rows().rms_norm;
  parallel_for(0, p.x.size(0) * inner, 1 + kGrainElements / hidden,
               [&](std::int64_t a, std::int64_t b) {
                 for (std::int64_t row = a; row < b; ++row) {
                   const std::int64_t i = row / inner;
                   const std::int64_t j = row % inner;
                   const auto offset = [&](const TensorView& v) {
                     return i * v.stride(0) + (has_heads ? j * v.stride(1) : 0);
                   };
                   run(row_of(p.x, offset(p.x)), p.x.dtype, p.weight.data, p.weight.dtype,
                       row_of(p.out, offset(p.out)), hidden, p.eps);
                 }
               });
}

void add_rms_norm_cpu(const AddRmsNormParams& p) {
  const std::int64_t hidden = p.x.size(1);
  const auto run = rows().add_rms_norm;
  parallel_for(0, p.x.size(0), 1 + kGrainElements / hidden, [&](std::int64_t a, std::int64_t b) {
    for (std::int64_t i = a; i < b; ++i) {
      run(row_of(p.x, i * p.x.stride(0)), p.x.dtype, row_of(p.residual, i * p.residual.stride(0)),
          p.residual.dtype, p.weight.data, p.weight.dtype, row_of(p.out, i * p.out.stride(0)),
          hidden, p.eps);
    }
  });
}

}  // namespace fastgpt::norm
