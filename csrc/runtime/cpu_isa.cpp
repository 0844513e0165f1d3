#include "fastgpt/cpu_isa.h"

#include <cpuid.h>

#include <atomic>

#include "fastgpt/check.h"

namespace fastgpt {
namespace {

// __builtin_cpu_supports("f16c") is not known to clang 16.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

CpuIsa best_isa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) {
    return CpuIsa::kPortable;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    return CpuIsa::kAVX512;
  }
  return CpuIsa::kAVX2;
}

std::atomic<CpuIsa>& current_isa() {
  static std::atomic<CpuIsa> isa{best_isa()};
  return isa;
}

std::atomic<bool>& bf16_dot() {
  static std::atomic<bool> use{__builtin_cpu_is("intel") == 0};
  return use;
}

}  // namespace

CpuIsa cpu_isa() { return current_isa().load(std::memory_order_relaxed); }

bool has_avx512_bf16() {
  static const bool supported = __builtin_cpu_supports("avx512bf16") != 0;
  return supported && cpu_isa() == CpuIsa::kAVX512;
}

bool use_bf16_dot() { return has_avx512_bf16() && bf16_dot().load(std::memory_order_relaxed); }

void set_bf16_dot(bool use) {
  FASTGPT_CHECK(!use || has_avx512_bf16(), "bf16_dot is on, but this processor or cpu_isa ",
                cpu_isa_name(cpu_isa()), " has no AVX512-BF16");
  bf16_dot().store(use, std::memory_order_relaxed);
}

void set_cpu_isa(CpuIsa isa) {
  const CpuIsa best = best_isa();
  FASTGPT_CHECK(isa <= best, "cpu_isa is ", cpu_isa_name(isa), "; this processor has at most ",
                cpu_isa_name(best));
  current_isa().store(isa, std::memory_order_relaxed);
}

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return "portable";
    case CpuIsa::kAVX2:
      return "avx2";
    case CpuIsa::kAVX512:
      return "avx512";
  }
  return "unknown";
}

}  // namespace fastgpt
