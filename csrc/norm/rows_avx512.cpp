#include "norm/rows_kernel.h"

namespace fastgpt::norm {

const Rows kRowsAvx512 = kTable;

}  // namespace fastgpt::norm
