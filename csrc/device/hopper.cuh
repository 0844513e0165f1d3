// What launchers of kernels for Hopper alone need to know.
#pragma once

namespace fastgpt::device {

struct HopperTraits {
  bool has_wgmma;       // the code that runs here is for sm_90a: it may use wgmma.cuh
  int max_clusters[9];  // [size]: clusters of `size` CTAs that run at once if a CTA needs an SM
};

/// Traits of the current device, looked up once per device. Read off a compiled kernel: code for
/// 9.0 in general, which is what a newer device runs, has no wgmma.
const HopperTraits& hopper_traits();

}  // namespace fastgpt::device
