// From a pointer to its block, for blocks that are out of the heap. Sharded: a free on one thread
// does not wait for a free on another.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "memory/block.h"
#include "memory/spin_lock.h"

namespace fastgpt::memory {

/// Open addressing with linear probing; erasing shifts back, so there are no tombstones and the
/// cost does not grow with history. Keys lie in the table: looking for one block touches no other.
class BlockMap {
 public:
  void insert(Block* block) {
    Shard& shard = shard_of(block->data);
    std::lock_guard lock(shard.mutex);
    if (2 * (shard.size + 1) > shard.table.size()) grow(shard);
    place(shard.table, {block->data, block});
    ++shard.size;
  }

  /// Run `use(Block*)`, nullptr when there is none, while the pointer's shard is locked.
  template <class Use>
  auto with(const void* data, Use use) {
    Shard& shard = shard_of(data);
    std::lock_guard lock(shard.mutex);
    const std::size_t mask = shard.table.size() - 1;
    for (std::size_t i = home(data, mask); shard.table[i].block != nullptr; i = (i + 1) & mask) {
      if (shard.table[i].data == data) return use(shard.table[i].block);
    }
    return use(static_cast<Block*>(nullptr));
  }

  void erase(const Block* block) {
    Shard& shard = shard_of(block->data);
    std::lock_guard lock(shard.mutex);
    auto& table = shard.table;
    const std::size_t mask = table.size() - 1;
    std::size_t hole = home(block->data, mask);
    while (table[hole].block != block) hole = (hole + 1) & mask;
    for (std::size_t i = (hole + 1) & mask; table[i].block != nullptr; i = (i + 1) & mask) {
      // An entry may move into the hole when its home is not between the hole and itself.
      if (((i - home(table[i].data, mask)) & mask) >= ((i - hole) & mask)) {
        table[hole] = table[i];
        hole = i;
      }
    }
    table[hole] = {};
    --shard.size;
  }

 private:
  struct Entry {
    const void* data = nullptr;
    Block* block = nullptr;
  };
  struct alignas(64) Shard {
    SpinLock mutex;
    std::vector<Entry> table = std::vector<Entry>(16);
    std::size_t size = 0;
  };
  static constexpr int kShardBits = 8;  // sixteen threads seldom meet

  // Fibonacci hashing; the top bits pick the shard, the next ones the place.
  static std::uint64_t hash(const void* data) {
    return (std::uint64_t(reinterpret_cast<std::uintptr_t>(data)) >> 8) * 0x9E3779B97F4A7C15U;
  }
  static std::size_t home(const void* data, std::size_t mask) {
    return std::size_t(hash(data) >> 24) & mask;
  }
  Shard& shard_of(const void* data) { return shards_[hash(data) >> (64 - kShardBits)]; }

  static void place(std::vector<Entry>& table, Entry entry) {
    const std::size_t mask = table.size() - 1;
    std::size_t i = home(entry.data, mask);
    while (table[i].block != nullptr) i = (i + 1) & mask;
    table[i] = entry;
  }
  static void grow(Shard& shard) {
    std::vector<Entry> table(2 * shard.table.size());
    for (const Entry& entry : shard.table) {
      if (entry.block != nullptr) place(table, entry);
    }
    shard.table = std::move(table);
  }

  std::array<Shard, std::size_t{1} << kShardBits> shards_;
};

}  // namespace fastgpt::memory
