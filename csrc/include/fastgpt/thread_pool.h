// The one pool of worker threads that every CPU kernel shares.
#pragma once
#include <cstdint>
#include <functional>

namespace fastgpt {

/// Set the number of threads, the caller included. Takes effect once, before the first
/// parallel_for; later calls with another value throw InvalidArgument.
/// @param num_threads >= 1, or 0 for the number of cores this process may run on.
void set_num_threads(int num_threads);

/// Threads that parallel_for uses, the caller included.
int num_threads();

/// Run fn(first, last) over disjoint pieces that cover [begin, end), each at least `grain` long
/// (the last may be shorter), and return when all are done. The pieces depend only on the
/// arguments and num_threads(). The first exception thrown by fn is rethrown here.
/// A nested call, and a call made while another thread holds the pool, run on the caller alone.
void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& fn);

}  // namespace fastgpt
