#include "memory/backing.h"

#include <algorithm>

namespace fastgpt::memory {
namespace {

// Address space costs nothing; evicted entries keep theirs, so a pool needs more than it commits.
constexpr std::size_t kAddressFactor = 8;

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
  for (const auto& [address, handle] : handles_) unmap({address, handle});
  if (base_ != nullptr) upstream_->unreserve(base_, address_bytes_);
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

std::optional<std::vector<Backing::Mapped>> Backing::map(const std::vector<Range>& gaps) {
  std::vector<Mapped> done;
  for (const Range& gap : gaps) {
    std::vector<Handle> handles;
    bool mapped = false;
    try {
      std::size_t made = 0;
      while (made < gap.bytes()) {
        ++num_calls_;
        const Handle handle = upstream_->create(std::min(handle_bytes_, gap.bytes() - made));
        if (handle.id == 0) break;
        handles.push_back(handle);
        made += handle.bytes;
      }
      if (made == gap.bytes()) {
        ++num_calls_;
        mapped = upstream_->map(gap.begin, handles);
      }
    } catch (...) {
      for (const Handle handle : handles) upstream_->destroy(handle);
      abandon(done);
      throw;
    }
    if (!mapped) {
      for (const Handle handle : handles) upstream_->destroy(handle);
      abandon(done);
      return std::nullopt;
    }
    std::byte* at = gap.begin;
    for (const Handle handle : handles) {
      done.push_back({at, handle});
      at += handle.bytes;
    }
  }
  return done;
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

void Backing::abandon(const std::vector<Mapped>& mapped) noexcept {
  for (const Mapped& one : mapped) unmap(one);
}

}  // namespace fastgpt::memory
