#include "runtime/happens_before.h"

#include <algorithm>

namespace fastgpt {

std::size_t HappensBefore::id(void* stream) {
  const auto [found, is_new] = ids_.try_emplace(stream, clocks_.size());
  if (is_new) clocks_.emplace_back();
  return found->second;
}

HappensBefore::Clock& HappensBefore::clock_of(void* stream) { return clocks_[id(stream)]; }

void HappensBefore::merge(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void HappensBefore::enqueue(void* stream) {
  const std::size_t self = id(stream);
  Clock& clock = clocks_[self];
  merge(clock, host_);
  if (clock.size() <= self) clock.resize(self + 1);
  ++clock[self];
}

void HappensBefore::host_waits_for_all() {
  for (const Clock& clock : clocks_) merge(host_, clock);
}

// No segment crosses `at` afterwards.
void HappensBefore::split_at(const std::byte* at) {
  auto after = segments_.upper_bound(at);
  if (after == segments_.begin()) return;
  auto& [begin, segment] = *std::prev(after);
  if (begin == at || segment.end <= at) return;
  Segment tail = segment;
  segment.end = at;
  segments_.emplace(at, std::move(tail));
}

std::optional<std::string> HappensBefore::access(void* stream, const std::byte* data,
                                                 std::size_t bytes, bool writes) {
  if (bytes == 0) return std::nullopt;
  std::optional<std::string> race;
  const std::size_t self = id(stream);
  const Clock& clock = clocks_[self];
  const Use use{self, clock[self]};
  const std::byte* const end = data + bytes;
  split_at(data);
  split_at(end);
  const auto check = [&](const std::vector<Use>& others, const char* what) {
    for (const Use& other : others) {
      if (!covers(clock, other)) {
        race = std::string(writes ? "a write" : "a read") + " that does not wait for " + what +
               " on another stream";
      }
    }
  };
  const auto from = segments_.lower_bound(data);
  auto to = from;
  for (; to != segments_.end() && to->first < end; ++to) {
    check(to->second.writes, "a write");
    if (writes) check(to->second.reads, "a read");
  }
  if (writes) {
    segments_.erase(from, to);
    segments_.emplace(data, Segment{end, {use}, {}});
    return race;
  }
  const std::byte* at = data;
  for (auto it = from; it != to; ++it) {
    auto& [begin, segment] = *it;
    if (at < begin) segments_.emplace(at, Segment{begin, {}, {use}});
    at = segment.end;
    std::erase_if(segment.reads, [&](const Use& other) { return other.stream == self; });
    segment.reads.push_back(use);
  }
  if (at < end) segments_.emplace(at, Segment{end, {}, {use}});
  return race;
}

std::optional<std::string> HappensBefore::retire(const std::byte* data, std::size_t bytes) {
  std::optional<std::string> race;
  split_at(data);
  split_at(data + bytes);
  auto it = segments_.lower_bound(data);
  while (it != segments_.end() && it->first < data + bytes) {
    for (const auto* uses : {&it->second.writes, &it->second.reads}) {
      for (const Use& use : *uses) {
        if (!covers(host_, use)) race = "work that the host has not waited for";
      }
    }
    it = segments_.erase(it);
  }
  return race;
}

}  // namespace fastgpt
