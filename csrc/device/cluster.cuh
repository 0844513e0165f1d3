// How CTAs of a cluster meet without ordering memory, and send values that order themselves. Code
// for compute capability 9.0 and newer; nothing below.
#pragma once
#include <cstdint>

#include "device/bulk.cuh"

namespace fastgpt::device {

/// The two halves of cluster_sync_relaxed: arrive, do something else, wait for the others.
__device__ inline void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

/// Store four floats to the address that `pointer` has here, in shared memory of CTA `rank`, whose
/// `barrier` counts the 16 bytes in: who waits for it sees them. PTX ISA 9.7.9.12, st.async.
__device__ inline void store_cluster_async(float* pointer, const float4& value,
                                           std::uint64_t* barrier, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 there, counter; mapa.shared::cluster.u32 there, %0, %2; "
      "mapa.shared::cluster.u32 counter, %1, %2; "
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
      "[there], {%3, %4, %5, %6}, [counter];}" ::"r"(smem_address(pointer)),
      "r"(smem_address(barrier)), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
#endif
}

}  // namespace fastgpt::device
