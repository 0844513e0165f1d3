#include "fastgpt/thread_pool.h"
#include "norm/kernels.h"
#include "norm/rows.h"

namespace fastgpt::norm {
namespace {

constexpr std::int64_t kGrainElements = 16384;  // below this a thread costs more than it saves

}  // namespace

void silu_mul_cpu(const SiluMulParams& p) {
  const std::int64_t width = p.out.size(1);
  const std::int64_t bytes = dtype_bytes(p.x.dtype);
  const auto run = rows().silu_mul;
  parallel_for(0, p.x.size(0), 1 + kGrainElements / width, [&](std::int64_t a, std::int64_t b) {
    for (std::int64_t i = a; i < b; ++i) {
      const char* gate = p.x.as<char>() + i * p.x.stride(0) * bytes;
      run(gate, gate + width * bytes, p.x.dtype, p.out.as<char>() + i * p.out.stride(0) * bytes,
          width);
    }
  });
}

}  // namespace fastgpt::norm
