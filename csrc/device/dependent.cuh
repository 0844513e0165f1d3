// Programmatic dependent launch: kernels that come to the device while their predecessor runs.
//
//   kernel n     ──── work ────────────────────┤ ends, its writes are visible
//   kernel n + 1      │ reads constants ·· wait ┤── work ──
//                     ▲ all CTAs of n have started
//
// Two rules make this safe, and the types below hold every kernel to both. (1) A kernel reads and
// writes nothing that another kernel may touch before its wait. (2) Every thread waits before it
// leaves: a kernel then ends only after its predecessor has, so that waiting for one kernel is
// waiting for all before it. The wait also orders what lies in between: scratch that kernel n
// still reads is not written by kernel n + 1.
#pragma once
#include <cuda_runtime.h>

#include "device/arch.cuh"
#include "fastgpt/check.h"
#include "fastgpt/launch_scope.h"

namespace fastgpt::device {

/// The one parameter of a kernel that launch() takes. wait() is the way to the arguments, so a
/// kernel cannot work without having waited.
template <class Args>
class Dependent {
 public:
  explicit Dependent(const Args& args) : args_(args) {}

  /// The arguments, once all that earlier kernels wrote is visible. Every thread calls it before
  /// its first return; a second call costs nothing. Data that the predecessor writes must not be
  /// loaded by ld.global.nc (__ldg): the compiler may move such a load above the wait.
  /// PTX ISA, griddepcontrol.
  __device__ const Args& wait() const {
    constants();
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    return args_;
  }

  /// The arguments at once, to read constants (launch_scope.h) and nothing else; wait() follows.
  __device__ const Args& constants() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    return args_;
  }

 private:
  Args args_;
};

/// Launch a kernel, overlapped with its predecessor where the scope and the device's code allow.
/// @param cluster CTAs that share one cluster along x; more than 1 needs code for 9.0.
template <class Args>
void launch(void (*kernel)(Dependent<Args>), dim3 grid, dim3 block, std::size_t shared_bytes,
            cudaStream_t stream, const Args& args, unsigned cluster = 1) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (overlap_launches() && current_traits().arch >= 90) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  FASTGPT_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, Dependent<Args>(args)));
}

}  // namespace fastgpt::device
