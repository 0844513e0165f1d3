#include "norm/rows_kernel.h"

namespace fastgpt::norm {

const Rows kRowsAvx2 = kTable;

}  // namespace fastgpt::norm
