#include "moe/combine_kernel.h"

namespace fastgpt::moe {

void combine_avx2(const CombineRow& row) { combine(row); }

}  // namespace fastgpt::moe
