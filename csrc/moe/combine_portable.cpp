#include "moe/combine_kernel.h"

namespace fastgpt::moe {

void combine_portable(const CombineRow& row) { combine(row); }

}  // namespace fastgpt::moe
