// PTX instructions behind named functions. Below compute capability 8.0 the asynchronous copies and
// the matrix products do not exist; kernels that use them are not launched there.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastgpt::device {

__device__ inline std::uint32_t smem_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Fill 16 bytes of shared memory asynchronously, past L1: `bytes` from global memory, then zeros.
/// PTX ISA 9.7.9.25.3.1, cp.async.
__device__ inline void copy_async_16(void* shared, const void* global, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#endif
}

__device__ inline void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Wait until at most kPending of this thread's groups are unfinished.
template <int kPending>
__device__ inline void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

/// d += a * b for one 16 x 8 tile over 16 columns. With g = lane / 4, t = lane % 4: a holds rows g,
/// g + 8, g, g + 8 at columns 2t (first two) and 2t + 8; b holds its column g at rows 2t and
/// 2t + 8; d holds rows g (first two) and g + 8 at columns 2t, 2t + 1.
/// PTX ISA 9.7.14.5.8, mma.m16n8k16.
template <class T>
__device__ inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                   std::uint32_t b1);

template <>
__device__ inline void mma_16x8x16<__half>(float (&d)[4], const std::uint32_t (&a)[4],
                                           std::uint32_t b0, std::uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <>
__device__ inline void mma_16x8x16<__nv_bfloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                  std::uint32_t b0, std::uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// The same tile over 8 columns in tf32 (8-bit exponent, 10-bit mantissa): a holds rows g, g + 8 at
/// column t (first two) and t + 4, b its column g at rows t and t + 4. float16 and bfloat16 values
/// are exact in tf32, so a product of one with the other is.
/// PTX ISA 9.7.14.5.7, mma.m16n8k8.
__device__ inline void mma_16x8x8_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                       std::uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// 2^x within 2 units in the last place, results under 2^-126 flushed to zero: one instruction
/// where exp2f takes four. PTX ISA 9.7.3.21, ex2.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// (value & mask) | bits in one instruction. PTX ISA 9.7.8.6, lop3.
template <std::uint32_t kMask, std::uint32_t kBits>
__device__ inline std::uint32_t and_or(std::uint32_t value) {
  std::uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "n"(kMask), "n"(kBits));
  return result;
}

/// (value & mask) ^ bits in one instruction. PTX ISA 9.7.8.6, lop3.
template <std::uint32_t kMask, std::uint32_t kBits>
__device__ inline std::uint32_t and_xor(std::uint32_t value) {
  std::uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(value), "n"(kMask), "n"(kBits));
  return result;
}

/// a * b + c on a pair of bfloat16, rounded once. PTX ISA 9.7.4.4, fma.
__device__ inline std::uint32_t fma_bf16x2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t d = 0;
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
  return d;
}

}  // namespace fastgpt::device
