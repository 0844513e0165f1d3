// Dot for sets without products of bytes: loops that the compiler turns into its vectors, as fast
// as float32 at best. What it is for is the same exact sums everywhere. Included by
// eight_bit_portable.cpp and eight_bit_avx2.cpp.
#pragma once
#include <cstdint>
#include <cstring>

namespace fastgpt::gemm {
namespace {

struct Dot {
  static constexpr int kRows = 4;
  static constexpr int kPanelsAtOnce = 1;
  static constexpr std::int32_t kExcess = 0;

  template <int kCount>
  static void add_up(const std::int8_t* const (&x)[kCount], const std::int8_t* weight,
                     std::int64_t steps, std::int64_t step_bytes,
                     std::int32_t (&sums)[kCount][1][16]) {
    std::memset(sums, 0, sizeof(sums));
    for (std::int64_t s = 0; s < steps; ++s, weight += step_bytes) {
      for (int word = 0; word < 2; ++word) {
        const std::int8_t* w = weight + word * 64;
        for (int r = 0; r < kCount; ++r) {
          const std::int8_t* const c = x[r] + s * 8 + word * 4;
          for (int lane = 0; lane < 16; ++lane) {
            sums[r][0][lane] += c[0] * w[lane * 4] + c[1] * w[lane * 4 + 1] +
                                c[2] * w[lane * 4 + 2] + c[3] * w[lane * 4 + 3];
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace fastgpt::gemm
