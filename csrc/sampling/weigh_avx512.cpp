#include "sampling/weigh_kernel.h"

namespace fastgpt::sampling {

const Runs kRunsAvx512 = kTable;

}  // namespace fastgpt::sampling
