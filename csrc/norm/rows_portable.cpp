#include "norm/rows_kernel.h"

namespace fastgpt::norm {

const Rows kRowsPortable = kTable;

}  // namespace fastgpt::norm
