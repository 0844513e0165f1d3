// Whether the CUDA kernels of this thread may start before the kernel in front of them has ended.
#pragma once

namespace fastgpt {

/// Let this thread's launches overlap from now on, or stop them; off at the start.
///
/// Programmatic dependent launch: a kernel of csrc/attention, gemm, kv_cache, moe, norm or sampling
/// comes to the device while its predecessor runs, and waits there before it touches anything that
/// another kernel may write. What it reads ahead of that wait are the constants: the packed
/// weights, scales and zero points of linear and batched_linear. Whoever turns this on promises
/// that no work still running on the device writes them, so a caller that has just loaded or moved
/// weights synchronizes first. The second kernel of one operation overlaps the first in any case:
/// it reads nothing ahead. Needs code for compute capability 9.0; without effect elsewhere.
void set_overlap_launches(bool overlap);

/// What set_overlap_launches said last on this thread.
bool overlap_launches();

}  // namespace fastgpt
