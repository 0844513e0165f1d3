// Warp-group products of Hopper (wgmma). They exist in code for sm_90a alone; hopper_traits says
// whether that code runs. PTX ISA 9.7.15.
//
// d[64][kN] += a[64][16] b[kN][16]^T, accumulated in float32 by the four warps of a warp group. In
// warp w and lane, with g = lane / 4 and t = lane % 4, d[4 j ..] holds
//   rows 16 w + g (first two) and 16 w + g + 8, columns 8 j + 2 t, 8 j + 2 t + 1.
// An operand in registers is the one of mma.m16n8k16 (ptx.cuh) for rows 16 w .. 16 w + 15.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTGPT_HAS_WGMMA
#endif

namespace fastgpt::device {

/// Descriptor of an operand in shared memory: rows of 128 bytes (64 columns), 16-byte chunks
/// exchanged as TMA does under 128-byte swizzling, tiles aligned to 1 KiB. The operand 16 columns
/// further is at + 2. PTX ISA 9.7.15.5.1.
__device__ inline std::uint64_t wgmma_operand(std::uint32_t shared_address) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t(1) << 62;
  constexpr std::uint64_t kEightRows = std::uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kEightRows | std::uint64_t(1) << 16 | (shared_address & 0x3FFFF) >> 4;
}

/// Descriptor of an operand b that lies transposed, [k][columns], in tiles of 64 columns: rows of
/// 128 bytes, swizzled like wgmma_operand's; the next 64 columns are `tile_bytes` further. The
/// operand 16 rows further is at + 128. PTX ISA 9.7.15.5.1.
__device__ inline std::uint64_t wgmma_transposed_operand(std::uint32_t shared_address,
                                                         std::uint32_t tile_bytes) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t(1) << 62;
  constexpr std::uint64_t kEightRows = std::uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kEightRows | std::uint64_t(tile_bytes >> 4) << 16 |
         (shared_address & 0x3FFFF) >> 4;
}

/// The same descriptor, but computed with only from here on: sums with constants that a loop needs
/// again stay cheap uniform instructions instead of registers kept through it.
__device__ inline std::uint64_t wgmma_fresh(std::uint64_t operand) {
  asm volatile("" : "+l"(operand));
  return operand;
}

/// Before the first product after registers of its operands were written. PTX ISA 9.7.15.7.1.
__device__ inline void wgmma_fence() {
#ifdef FASTGPT_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/// Close the group of products since the last call. PTX ISA 9.7.15.7.2.
__device__ inline void wgmma_commit() {
#ifdef FASTGPT_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/// Wait until at most kPending groups are unfinished. PTX ISA 9.7.15.7.3.
template <int kPending>
__device__ inline void wgmma_wait() {
#ifdef FASTGPT_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

/// Keep the compiler from moving uses of registers that products in flight own.
template <class Register, int kCount>
__device__ inline void wgmma_hold(Register (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<Register, float>) {
      asm volatile("" : "+f"(r[i])::"memory");
    } else {
      asm volatile("" : "+r"(r[i])::"memory");
    }
  }
}

/// Set the registers of every thread of this warp group, a multiple of 8; called by its four warps.
/// What some give back others can take. PTX ISA 9.7.20.5, setmaxnreg.
template <int kCount>
__device__ inline void give_back_registers() {
#ifdef FASTGPT_HAS_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ inline void take_registers() {
#ifdef FASTGPT_HAS_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// The instruction names each of its up to 128 accumulators.
#define FASTGPT_WGMMA_D0             \
  "%0,%1,%2,%3,%4,%5,%6,%7,"         \
  "%8,%9,%10,%11,%12,%13,%14,%15,"   \
  "%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31"
#define FASTGPT_WGMMA_D1             \
  "%32,%33,%34,%35,%36,%37,%38,%39," \
  "%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55," \
  "%56,%57,%58,%59,%60,%61,%62,%63"
#define FASTGPT_WGMMA_D2             \
  "%64,%65,%66,%67,%68,%69,%70,%71," \
  "%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87," \
  "%88,%89,%90,%91,%92,%93,%94,%95"
#define FASTGPT_WGMMA_D3                     \
  "%96,%97,%98,%99,%100,%101,%102,%103,"     \
  "%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119," \
  "%120,%121,%122,%123,%124,%125,%126,%127"
#define FASTGPT_WGMMA_F8(i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTGPT_WGMMA_F32(i) \
  FASTGPT_WGMMA_F8(i), FASTGPT_WGMMA_F8(i + 8), FASTGPT_WGMMA_F8(i + 16), FASTGPT_WGMMA_F8(i + 24)

#define FASTGPT_WGMMA_D64 FASTGPT_WGMMA_D0
#define FASTGPT_WGMMA_F64 FASTGPT_WGMMA_F32(0)
#define FASTGPT_WGMMA_D128 FASTGPT_WGMMA_D0 "," FASTGPT_WGMMA_D1
#define FASTGPT_WGMMA_F128 FASTGPT_WGMMA_F64, FASTGPT_WGMMA_F32(32)
#define FASTGPT_WGMMA_D192 FASTGPT_WGMMA_D128 "," FASTGPT_WGMMA_D2
#define FASTGPT_WGMMA_F192 FASTGPT_WGMMA_F128, FASTGPT_WGMMA_F32(64)
#define FASTGPT_WGMMA_D256 FASTGPT_WGMMA_D192 "," FASTGPT_WGMMA_D3
#define FASTGPT_WGMMA_F256 FASTGPT_WGMMA_F192, FASTGPT_WGMMA_F32(96)

// %i0 .. are the operands behind the N / 2 accumulators.
#define FASTGPT_WGMMA_SHARED(N, TYPE, i0, i1, i2, i3)                                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
               " {" FASTGPT_WGMMA_D##N "}, %" #i0 ", %" #i1 ", %" #i2 ", 1, 1, 0, %" #i3 ";" \
               : FASTGPT_WGMMA_F##N                                                          \
               : "l"(a), "l"(b), "n"(int(kAdd)), "n"(int(kTransposed)))
#define FASTGPT_WGMMA_REGISTERS(N, TYPE, i0, i1, i2, i3, i4, i5, i6)                          \
  asm volatile(                                                                               \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FASTGPT_WGMMA_D##N \
      "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", %" #i5 ", 1, 1, %" #i6 ";"         \
      : FASTGPT_WGMMA_F##N                                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kAdd)), "n"(int(kTransposed)))

/// d += a b^T, both operands in shared memory. Starts the product; d is valid after
/// wgmma_wait. PTX ISA 9.7.15.5.2.
/// @tparam kTransposed b lies as [16][kN], see wgmma_transposed_operand.
/// @tparam kAdd false: d = a b^T.
template <class T, bool kTransposed = false, bool kAdd = true, int kHalf>
__device__ inline void wgmma(float (&d)[kHalf], std::uint64_t a, std::uint64_t b) {
#ifdef FASTGPT_HAS_WGMMA
  constexpr bool kF16 = std::is_same_v<T, __half>;
  static_assert(kHalf == 32 || kHalf == 64 || kHalf == 96 || kHalf == 128);
  if constexpr (kHalf == 32) {
    if constexpr (kF16)
      FASTGPT_WGMMA_SHARED(64, "f16", 32, 33, 34, 35);
    else
      FASTGPT_WGMMA_SHARED(64, "bf16", 32, 33, 34, 35);
  } else if constexpr (kHalf == 64) {
    if constexpr (kF16)
      FASTGPT_WGMMA_SHARED(128, "f16", 64, 65, 66, 67);
    else
      FASTGPT_WGMMA_SHARED(128, "bf16", 64, 65, 66, 67);
  } else if constexpr (kHalf == 96) {
    if constexpr (kF16)
      FASTGPT_WGMMA_SHARED(192, "f16", 96, 97, 98, 99);
    else
      FASTGPT_WGMMA_SHARED(192, "bf16", 96, 97, 98, 99);
  } else {
    if constexpr (kF16)
      FASTGPT_WGMMA_SHARED(256, "f16", 128, 129, 130, 131);
    else
      FASTGPT_WGMMA_SHARED(256, "bf16", 128, 129, 130, 131);
  }
#endif
}

/// The same with a in registers, which belong to the product until wgmma_wait.
template <class T, bool kTransposed = false, bool kAdd = true, int kHalf>
__device__ inline void wgmma(float (&d)[kHalf], const std::uint32_t (&a)[4], std::uint64_t b) {
#ifdef FASTGPT_HAS_WGMMA
  constexpr bool kF16 = std::is_same_v<T, __half>;
  static_assert(kHalf == 32 || kHalf == 64 || kHalf == 96 || kHalf == 128);
  if constexpr (kHalf == 32) {
    if constexpr (kF16)
      FASTGPT_WGMMA_REGISTERS(64, "f16", 32, 33, 34, 35, 36, 37, 38);
    else
      FASTGPT_WGMMA_REGISTERS(64, "bf16", 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (kHalf == 64) {
    if constexpr (kF16)
      FASTGPT_WGMMA_REGISTERS(128, "f16", 64, 65, 66, 67, 68, 69, 70);
    else
      FASTGPT_WGMMA_REGISTERS(128, "bf16", 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (kHalf == 96) {
    if constexpr (kF16)
      FASTGPT_WGMMA_REGISTERS(192, "f16", 96, 97, 98, 99, 100, 101, 102);
    else
      FASTGPT_WGMMA_REGISTERS(192, "bf16", 96, 97, 98, 99, 100, 101, 102);
  } else {
    if constexpr (kF16)
      FASTGPT_WGMMA_REGISTERS(256, "f16", 128, 129, 130, 131, 132, 133, 134);
    else
      FASTGPT_WGMMA_REGISTERS(256, "bf16", 128, 129, 130, 131, 132, 133, 134);
  }
#endif
}

}  // namespace fastgpt::device
