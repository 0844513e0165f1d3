#include "gemm/eight_bit_words.h"
// The kernels below are written over Dot.
#include "gemm/eight_bit_kernel.h"

namespace fastgpt::gemm {

EightBitKernels eight_bit_kernels_avx2() { return {quantize_int8, multiply}; }

}  // namespace fastgpt::gemm
