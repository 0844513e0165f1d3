// Physical memory under an arena: handles mapped into one reservation, or fixed slabs; the budget.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "fastgpt/upstream.h"

namespace fastgpt::memory {

struct Range {
  std::byte* begin;
  std::byte* end;
  std::size_t bytes() const { return std::size_t(end - begin); }
};

/// Calls the driver without knowing blocks. Driver calls (map, unmap) change no counter; add and
/// remove change the counters and call no driver. So a failed call leaves everything as it was,
/// and the arena's lock need not be held during a slow one.
class Backing {
 public:
  Backing(std::shared_ptr<Upstream> upstream, std::size_t budget_bytes, std::size_t handle_bytes);
  ~Backing();
  Backing(const Backing&) = delete;
  Backing& operator=(const Backing&) = delete;

  bool can_map() const { return base_ != nullptr; }
  Range reservation() const { return {base_, base_ + address_bytes_}; }
  std::size_t granularity() const { return granularity_; }
  std::size_t handle_bytes() const { return handle_bytes_; }
  std::size_t budget_bytes() const { return budget_bytes_; }
  std::size_t committed_bytes() const { return committed_bytes_; }
  std::size_t room_bytes() const { return budget_bytes_ - committed_bytes_; }
  std::uint64_t num_calls() const { return num_calls_; }
  const std::map<std::byte*, Handle>& handles() const { return handles_; }

  /// The range widened to multiples of the granularity.
  Range widen(Range range) const;
  /// Parts of a widened range without physical memory.
  std::vector<Range> gaps(Range range) const;

  struct Mapped {
    std::byte* address;
    Handle handle;
  };
  struct Commit {
    bool is_done = false;
    std::vector<Mapped> mapped;          // what add has to count, also when it is not done
    std::exception_ptr error = nullptr;  // what the driver said, else: it has no more memory
  };
  /// Create handles and map them under the gaps, all or nothing. Nothing may fail, too: what the
  /// driver then does not take back stays mapped and is returned.
  Commit map(const std::vector<Range>& gaps) noexcept;
  /// A fixed slab, as one handle. @return nothing when the device has no more.
  std::optional<Mapped> allocate_slab(std::size_t bytes);
  void add(const std::vector<Mapped>& mapped);

  /// Give one handle (or slab) back. @return false with it still in place.
  bool unmap(const Mapped& mapped) noexcept;
  void remove(const Mapped& mapped);

 private:
  bool map(Range gap, std::vector<Mapped>& mapped);

  const std::shared_ptr<Upstream> upstream_;
  const std::size_t granularity_;
  const std::size_t budget_bytes_;
  const std::size_t handle_bytes_;
  std::size_t address_bytes_ = 0;
  std::byte* base_ = nullptr;
  std::size_t committed_bytes_ = 0;
  std::atomic<std::uint64_t> num_calls_{0};
  std::map<std::byte*, Handle> handles_;
};

}  // namespace fastgpt::memory
