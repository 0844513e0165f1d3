#include "gemm/vector_avx512.h"
// The kernels below are written over V.
#include "gemm/panel_kernel.h"

namespace fastgpt::gemm {

PanelKernels panel_kernels_avx512() { return {run_f32, nullptr}; }

}  // namespace fastgpt::gemm
