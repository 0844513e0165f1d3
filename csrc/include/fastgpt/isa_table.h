// Picking the variant of a kernel table that fits the instruction set in use.
#pragma once
#include "fastgpt/cpu_isa.h"

namespace fastgpt {

/// One of three functions (or pointers to tables of them) compiled from one source, each for its
/// instruction set.
template <class Table>
Table table_of_isa(Table portable, Table avx2, Table avx512) {
  switch (cpu_isa()) {
    case CpuIsa::kAVX512:
      return avx512;
    case CpuIsa::kAVX2:
      return avx2;
    case CpuIsa::kPortable:
      break;
  }
  return portable;
}

}  // namespace fastgpt
