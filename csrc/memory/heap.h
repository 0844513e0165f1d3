// Good-fit allocation in constant time over address ranges. No lock, no driver.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "memory/block.h"

namespace fastgpt::memory {

constexpr std::size_t kGranule = 256;  // every address and size is a multiple

/// Two-level segregated fit: free blocks are in lists by size, 32 lists per power of two, found
/// through two levels of bitmaps. A list is an array with the sizes in it: linked through the
/// blocks as in the paper, each look at one more block would be one more cache miss. Neighbours
/// merge when they are freed. Metadata lives here, in host memory, never in the blocks.
///
/// Source: M. Masmano et al., TLSF: a new dynamic memory allocator for real-time systems, 2004.
class Heap {
 public:
  /// Add a slab of address space without physical memory.
  Block* add_slab(std::byte* base, std::size_t bytes);
  /// Remove a slab that is one free or void block.
  void remove_slab(Block* whole);

  /// @return a free block of at least `bytes`, or nullptr. Looks at no more than kMaxLook blocks
  /// of the size's own list, then takes any of a larger list.
  Block* find(std::size_t bytes) const;
  /// Like find, but looks at the whole list: for the slow path, before memory is added.
  Block* find_thoroughly(std::size_t bytes) const;
  /// Another free block of at least `bytes` than the free `block`, or nullptr.
  Block* find_other(std::size_t bytes, Block* block);

  /// Take a free block out of the index and split its tail off. The block becomes kLive; its
  /// fence is the caller's to honour and is cleared here.
  void take(Block* block, std::size_t bytes, std::size_t requested);
  /// Free a block that is not in the index, and merge it with free neighbours; fences unite.
  Block* release(Block* block, Fence fence);
  /// Extend a live block into its free neighbour. @return the neighbour's fence.
  Fence extend(Block* block, std::size_t bytes);

  /// Physical memory appeared under [begin, end): void parts become free, unfenced and merged.
  void commit(std::byte* begin, std::byte* end);
  /// Physical memory is about to leave [begin, end), where nothing is live: free parts become
  /// void. `near` is a block at or behind `begin` of the same slab, where the walk starts.
  void decommit(Block* near, std::byte* begin, std::byte* end);

  /// Turn a block that is in no index into address space without physical memory.
  void make_void(Block* block);

  std::size_t free_bytes() const { return free_bytes_; }
  std::size_t largest_free_bytes() const;
  const std::map<std::byte*, Block*>& slabs() const { return slabs_; }  // base -> first block
  const std::map<std::byte*, Block*>& voids() const { return voids_; }

  /// @throws Error naming the first invariant that does not hold.
  void check_integrity() const;

 private:
  static constexpr int kNumLists = 32;
  static constexpr int kNumLevels = 40;  // blocks up to 2^47 bytes
  static constexpr std::size_t kMaxLook = 8;
  // Blocks in huge pages where there are some: a walk over neighbours misses the TLB less often.
  static constexpr std::size_t kChunkBytes = std::size_t{2} << 20;
  struct FreeChunk {
    void operator()(Block* chunk) const { std::free(chunk); }
  };
  struct Position {
    int level;
    int list;
  };

  static Position position(std::size_t bytes);
  Block* find_larger(Position above) const;
  Block* fit(std::size_t bytes, std::size_t max_look) const;
  Block* make_block(std::byte* data, std::size_t bytes);
  void drop_block(Block* block);
  void insert(Block* block);
  void remove(Block* block);
  Block* split(Block* block, std::size_t bytes);  // @return the tail, in no index
  Block* merge_around(Block* block);              // both sides; the result is in no index

  struct Listed {
    std::size_t bytes;
    Block* block;
  };
  using List = std::vector<Listed>;
  std::array<std::array<List, kNumLists>, kNumLevels> lists_;
  std::array<std::uint32_t, kNumLevels> used_lists_{};
  std::uint64_t used_levels_ = 0;
  std::size_t free_bytes_ = 0;
  std::map<std::byte*, Block*> slabs_;
  std::map<std::byte*, Block*> voids_;
  std::vector<std::unique_ptr<Block, FreeChunk>> chunks_;
  std::size_t num_made_ = 0;  // in the last chunk
  std::vector<Block*> spare_;
};

}  // namespace fastgpt::memory
