// An arena behind plain C functions, for allocators that take a pair of function names.
#pragma once
#include <cstddef>
#include <memory>

#include "fastgpt/arena.h"

namespace fastgpt {

/// Such a function has no argument that says which arena it means, so there is one exported pair
/// for each of these slots: fastgpt_allocate_<slot>(bytes, device, stream) and
/// fastgpt_free_<slot>(data, bytes, device, stream), for slot 0 .. kNumCAllocators - 1. They take
/// no lock of Python. fastgpt_allocate returns nullptr when the arena has no room, or when the
/// device is not the arena's.
constexpr int kNumCAllocators = 16;

/// Give an arena a slot. @return its index. @throws InvalidArgument if all are taken.
int open_c_allocator(std::shared_ptr<Arena> arena);

/// No more allocations come. The slot keeps the arena until its last block is freed, and can be
/// given away after that.
void close_c_allocator(int slot);

}  // namespace fastgpt
