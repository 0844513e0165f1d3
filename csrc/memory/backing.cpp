#include "memory/backing.h"

#include <algorithm>

namespace fastgpt::memory {
namespace {

// Address space costs nothing; evicted entries keep theirs, so a pool needs more than it commits.
constexpr std::size_t kAddressFactor = 8;

// A large gap is filled by pieces larger than asked for: the driver's cost is by the piece. What is
// committed for one request is in the end given back by its eighths, not finer.
constexpr std::size_t kMaxPiecesPerGap = 8;

constexpr std::size_t round_up(std::size_t bytes, std::size_t to) {
  return (bytes + to - 1) / to * to;
}

}  // namespace

Backing::Backing(std::shared_ptr<Upstream> upstream, std::size_t budget_bytes,
                 std::size_t handle_bytes)
    : upstream_(std::move(upstream)),
      granularity_(upstream_->granularity()),
      budget_bytes_(budget_bytes / granularity_ * granularity_),
      handle_bytes_(round_up(std::max<std::size_t>(handle_bytes, 1), granularity_)) {
  address_bytes_ = kAddressFactor * round_up(std::max(budget_bytes_, handle_bytes_), handle_bytes_);
  base_ = static_cast<std::byte*>(upstream_->reserve(address_bytes_));
}

Backing::~Backing() {
  bool all_unmapped = true;
  for (const auto& [address, handle] : handles_) all_unmapped &= unmap({address, handle});
  // Address space with something mapped in it cannot be given back; losing it is all we can do.
  if (base_ != nullptr && all_unmapped) upstream_->unreserve(base_, address_bytes_);
}

Range Backing::widen(Range range) const {
  const auto head = std::size_t(range.begin - base_) % granularity_;
  const auto tail = std::size_t(range.end - base_) % granularity_;
  return {range.begin - head, tail == 0 ? range.end : range.end + (granularity_ - tail)};
}

std::vector<Range> Backing::gaps(Range range) const {
  std::vector<Range> gaps;
  std::byte* at = range.begin;
  auto handle = handles_.upper_bound(at);
  if (handle != handles_.begin()) {
    const auto before = std::prev(handle);
    at = std::max(at, before->first + before->second.bytes);
  }
  for (; at < range.end; ++handle) {
    std::byte* const end =
        handle == handles_.end() ? range.end : std::min(range.end, handle->first);
    if (at < end) gaps.push_back({at, end});
    if (handle == handles_.end()) break;
    at = handle->first + handle->second.bytes;
  }
  return gaps;
}

bool Backing::map(Range gap, std::vector<Mapped>& mapped) {
  const std::size_t piece =
      std::max(handle_bytes_, round_up(gap.bytes() / kMaxPiecesPerGap, handle_bytes_));
  std::vector<Handle> handles;
  const auto destroy_all = [&] {
    for (const Handle handle : handles) upstream_->destroy(handle);
  };
  try {
    for (std::size_t made = 0; made < gap.bytes(); made += handles.back().bytes) {
      ++num_calls_;
      const Handle handle = upstream_->create(std::min(piece, gap.bytes() - made));
      if (handle.id == 0) {
        destroy_all();
        return false;
      }
      handles.push_back(handle);
    }
    ++num_calls_;
    if (!upstream_->map(gap.begin, handles)) {
      destroy_all();
      return false;
    }
  } catch (...) {
    destroy_all();
    throw;
  }
  std::byte* at = gap.begin;
  for (const Handle handle : handles) {
    mapped.push_back({at, handle});
    at += handle.bytes;
  }
  return true;
}

Backing::Commit Backing::map(const std::vector<Range>& gaps) noexcept {
  Commit commit;
  try {
    commit.is_done =
        std::all_of(gaps.begin(), gaps.end(), [&](Range gap) { return map(gap, commit.mapped); });
  } catch (const std::exception&) {
    commit.error = std::current_exception();
  }
  if (!commit.is_done) std::erase_if(commit.mapped, [&](const Mapped& one) { return unmap(one); });
  return commit;
}

std::optional<Backing::Mapped> Backing::allocate_slab(std::size_t bytes) {
  ++num_calls_;
  void* data = upstream_->allocate(bytes);
  if (data == nullptr) return std::nullopt;
  return Mapped{static_cast<std::byte*>(data), {0, bytes}};
}

void Backing::add(const std::vector<Mapped>& mapped) {
  for (const auto& [address, handle] : mapped) {
    handles_.emplace(address, handle);
    committed_bytes_ += handle.bytes;
  }
}

bool Backing::unmap(const Mapped& mapped) noexcept {
  ++num_calls_;
  if (!can_map()) {
    upstream_->free(mapped.address, mapped.handle.bytes);
    return true;
  }
  if (!upstream_->unmap(mapped.address, mapped.handle)) return false;
  upstream_->destroy(mapped.handle);
  return true;
}

void Backing::remove(const Mapped& mapped) {
  handles_.erase(mapped.address);
  committed_bytes_ -= mapped.handle.bytes;
}

}  // namespace fastgpt::memory
