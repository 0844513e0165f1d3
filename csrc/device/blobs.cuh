// Copies of packed weights' blobs (16 rows of 64 bytes that lie together) for products that read
// them from shared memory, and of runs of bytes beside them.
#pragma once
#include "device/bulk.cuh"

namespace fastgpt::device {

/// Copy contiguous bytes, a multiple of 16 with both ends aligned to 16. PTX ISA 9.7.9.25.5.2.
__device__ inline void copy_bulk(void* target, const void* source, unsigned bytes,
                                 std::uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_address(target)),
      "l"(source), "r"(bytes), "r"(smem_address(barrier))
      : "memory");
#endif
}

/// Host: map of bytes [tiles][blobs][16 rows][64 columns], contiguous but for `tile_stride` bytes
/// between tiles, copied in boxes of one blob of `box_tiles` tiles under 64-byte swizzling.
CUtensorMap blob_map(const void* data, std::int64_t tiles, std::int64_t blobs,
                     std::int64_t tile_stride, int box_tiles);

}  // namespace fastgpt::device
