#include "norm/rows.h"

#include "fastgpt/isa_table.h"

namespace fastgpt::norm {

const Rows& rows() { return *table_of_isa(&kRowsPortable, &kRowsAvx2, &kRowsAvx512); }

}  // namespace fastgpt::norm
