// Asynchronous copies of whole tiles (TMA), the barriers they signal, and CTAs of one cluster.
// Code for compute capability 9.0 and newer; nothing below.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "device/ptx.cuh"

namespace fastgpt::device {

/// A barrier in shared memory: a phase ends when `count` arrivals and all announced bytes are in.
/// PTX ISA 9.7.13.15.
__device__ inline void barrier_init(std::uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count)
               : "memory");
}

/// After barrier_init, before other CTAs and the copy engine use the barriers.
__device__ inline void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// Arrive once and announce bytes that copies will bring in this phase.
__device__ inline void barrier_expect(std::uint64_t* barrier, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(smem_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

__device__ inline void barrier_arrive(std::uint64_t* barrier, unsigned count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(count)
               : "memory");
#endif
}

/// Arrive once this thread's copies so far (copy_async_16) are done. PTX ISA 9.7.13.15.17.
__device__ inline void barrier_arrive_after_copies(std::uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(smem_address(barrier))
               : "memory");
#endif
}

/// Arrive at the same barrier of CTA `rank` of the cluster. It orders no memory of this thread
/// beyond the CTA (release.cluster costs a microsecond): finished products and copies need no more.
__device__ inline void barrier_arrive_at(std::uint64_t* barrier, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(smem_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

/// Wait for the end of the phase with this parity; a new barrier counts as one with parity 1 ended.
__device__ inline void barrier_wait(std::uint64_t* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; "
      "@!done bra again;}" ::"r"(smem_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

/// Copy the box of a tensor at coordinates (column, row, batch) to shared memory; what lies outside
/// the tensor arrives as zeros. PTX ISA 9.7.9.27.1.2.
__device__ inline void copy_box(void* target, const CUtensorMap& map, std::uint64_t* barrier,
                                int column, int row, int batch) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_address(target)),
      "l"(&map), "r"(smem_address(barrier)), "r"(column), "r"(row), "r"(batch)
      : "memory");
#endif
}

/// The same with four or five coordinates, the innermost first.
__device__ inline void copy_box(void* target, const CUtensorMap& map, std::uint64_t* barrier,
                                const int (&at)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_address(target)),
      "l"(&map), "r"(smem_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
      : "memory");
#endif
}
__device__ inline void copy_box(void* target, const CUtensorMap& map, std::uint64_t* barrier,
                                const int (&at)[5]) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem_address(target)),
      "l"(&map), "r"(smem_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "r"(at[4])
      : "memory");
#endif
}

/// The same to the same place of every CTA in `ranks`; each one's own barrier counts the bytes.
__device__ inline void copy_box_to(void* target, const CUtensorMap& map, std::uint64_t* barrier,
                                   int column, int row, int batch, unsigned ranks) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem_address(target)),
      "l"(&map), "r"(smem_address(barrier)), "r"(column), "r"(row), "r"(batch),
      "h"(std::uint16_t(ranks))
      : "memory");
#endif
}

/// Fetch a tensor map ahead of its first use.
__device__ inline void prefetch_map(const CUtensorMap& map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

/// Order this thread's plain accesses to shared memory before copies that other instructions start.
/// PTX ISA 9.7.13.4, fence.proxy.async.
__device__ inline void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// True in one lane of the warp, always the same; all lanes call it. Unlike a comparison of lane
/// numbers it tells the compiler that what follows runs in one lane, or it writes a loop over lanes
/// around every copy. PTX ISA 9.7.13.15, elect.sync.
__device__ inline bool elect_lane() {
  unsigned elected = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{.reg .pred elected; elect.sync _|elected, 0xFFFFFFFF; selp.u32 %0, 1, 0, elected;}"
               : "=r"(elected));
#endif
  return elected != 0;
}

/// Barrier kBarrier of a CTA, 1 .. 15, among `threads` of its threads. PTX ISA 9.7.13.1.
template <int kBarrier>
__device__ inline void named_barrier(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

/// The same for a number that differs between warps, and to arrive there without waiting.
__device__ inline void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// CTAs of this one's cluster, its number and that of clusters, its rank, and a barrier among all
/// threads of the cluster.
__device__ inline unsigned cluster_size() {
  unsigned size = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
__device__ inline unsigned cluster_id() {
  unsigned id = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
#endif
  return id;
}
__device__ inline unsigned num_clusters() {
  unsigned count = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
#endif
  return count;
}
__device__ inline unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
/// Orders no memory: that would cost about a microsecond.
__device__ inline void cluster_sync_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::
                   : "memory");
#endif
}

/// Store 16 bytes at the address that `pointer` has here, in shared memory of CTA `rank`; the
/// barrier there counts them. PTX ISA 9.7.9.12, st.async.
__device__ inline void store_cluster(void* pointer, const float* values, std::uint64_t* barrier,
                                     unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 there, barrier; mapa.shared::cluster.u32 there, %0, %2; "
      "mapa.shared::cluster.u32 barrier, %1, %2; "
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], "
      "{%3,%4,%5,%6}, [barrier];}" ::"r"(smem_address(pointer)),
      "r"(smem_address(barrier)), "r"(rank), "f"(values[0]), "f"(values[1]), "f"(values[2]),
      "f"(values[3])
      : "memory");
#endif
}

/// Store four 8 x 8 tiles of 16-bit values transposed: lane 8 i + j names the address of column j
/// of tile i, register i holds tile i as a product leaves it. PTX ISA 9.7.14.5.16.
__device__ inline void store_matrix_x4_transposed(void* address, const std::uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                   smem_address(address)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

/// Host: map of a tensor of 16-bit values [batches][rows][columns], copied in boxes of 64 columns
/// by `box_rows` rows under 128-byte swizzling. Strides in bytes; they and `data` are multiples
/// of 16.
/// @param is_float16 float16 values, else bfloat16.
CUtensorMap tensor_map(const void* data, bool is_float16, std::int64_t batches, std::int64_t rows,
                       std::int64_t columns, std::int64_t batch_stride, std::int64_t row_stride,
                       int box_rows);

/// The same of a tensor of five dimensions, the innermost (contiguous) first; boxes are 64 columns
/// by `box_rows` of the second. Strides in bytes, of dimensions 1 to 4.
CUtensorMap tensor_map(const void* data, bool is_float16, const std::int64_t (&sizes)[5],
                       const std::int64_t (&strides)[4], int box_rows);

/// Map of a tensor of 32-bit words [batches][tiles][blocks][words], copied in boxes of `box_tiles`
/// tiles of `box_blocks` blocks, as they lie or, with 32 words, under 128-byte swizzling. Strides
/// in bytes, multiples of 16 as is `data`.
CUtensorMap word_map(const void* data, std::int64_t batches, std::int64_t tiles,
                     std::int64_t blocks, int words, std::int64_t batch_stride, int box_tiles,
                     int box_blocks, bool swizzled);

}  // namespace fastgpt::device
