#include "sampling/weigh_kernel.h"

namespace fastgpt::sampling {

const Runs kRunsAvx2 = kTable;

}  // namespace fastgpt::sampling
