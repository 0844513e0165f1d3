// Which instruction set the CPU kernels use.
#pragma once

namespace fastgpt {

/// kAVX512 means F, BW, VL, DQ and VNNI; bf16 dot products are asked for apart.
enum class CpuIsa { kPortable, kAVX2, kAVX512 };

/// The set in use: the best one of this processor unless set_cpu_isa chose another.
CpuIsa cpu_isa();

/// True if cpu_isa() is kAVX512 and the processor has AVX512-BF16.
bool has_avx512_bf16();

/// True if products of bfloat16 rows shall use bfloat16 dot products: has_avx512_bf16(), and they
/// beat float32 FMA here. AMD (Zen 4 and later) runs them at twice the rate of FMA; Intel up to
/// Granite Rapids slower (measured: 100 against 162 GFLOP/s a core in the same kernel).
bool use_bf16_dot();

/// Override use_bf16_dot(), for tests of both paths. @throws InvalidArgument without AVX512-BF16.
void set_bf16_dot(bool use);

/// Choose a set. @throws InvalidArgument if this processor does not have it.
void set_cpu_isa(CpuIsa isa);

const char* cpu_isa_name(CpuIsa isa);

}  // namespace fastgpt
