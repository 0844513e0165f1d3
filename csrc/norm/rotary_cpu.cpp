#include "fastgpt/check.h"
#include "fastgpt/thread_pool.h"
#include "norm/kernels.h"
#include "norm/rows.h"

namespace fastgpt::norm {
namespace {

constexpr std::int64_t kGrainElements = 65536;  // below this a thread costs more than it saves

void rotate_token(const RotaryParams& p, const TensorView& x, std::int64_t token) {
  if (!x) return;
  const std::int64_t half = p.cos_sin.size(1) / 2;
  const float* cos =
      p.cos_sin.as<float>() + p.positions.as<std::int64_t>()[token] * p.cos_sin.stride(0);
  const auto rotate = rows().rotate;
  for (std::int64_t head = 0; head < x.size(1); ++head) {
    const std::int64_t offset = token * x.stride(0) + head * x.stride(1);
    rotate(x.as<char>() + offset * dtype_bytes(x.dtype), x.dtype, cos, cos + half, half,
           p.interleaved);
  }
}

}  // namespace

void rotary_cpu(const RotaryParams& p) {
  const std::int64_t num_tokens = p.q.size(0);
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    const std::int64_t position = p.positions.as<std::int64_t>()[i];
    FASTGPT_CHECK(position >= 0 && position < p.cos_sin.size(0), "positions[", i, "] is ", position,
                  "; cos_sin covers 0 to ", p.cos_sin.size(0) - 1);
  }
  const std::int64_t width = p.cos_sin.size(1) * (p.q.size(1) + (p.k ? p.k.size(1) : 0));
  parallel_for(0, num_tokens, 1 + kGrainElements / (width + 1),
               [&](std::int64_t a, std::int64_t b) {
                 for (std::int64_t i = a; i < b; ++i) {
                   rotate_token(p, p.q, i);
                   rotate_token(p, p.k, i);
                 }
               });
}

}  // namespace fastgpt::norm
