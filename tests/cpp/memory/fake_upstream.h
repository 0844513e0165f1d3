// A device that exists only in the test: it counts, fails on demand and remembers every wait.
#pragma once
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "fastgpt/upstream.h"

namespace fastgpt::test {

class FakeUpstream final : public Upstream {
 public:
  explicit FakeUpstream(std::size_t capacity) : capacity_(capacity) {}
  ~FakeUpstream() override {
    for (const auto& [data, bytes] : live_) std::free(data);
  }

  DeviceType device_type() const override { return DeviceType::kCPU; }
  int device() const override { return 0; }
  void* allocate(std::size_t bytes) override {
    ++num_allocations;
    if (used_ + bytes > capacity_ || fail_next) {
      fail_next = false;
      return nullptr;
    }
    void* data = std::aligned_alloc(256, bytes);
    live_[data] = bytes;
    used_ += bytes;
    return data;
  }
  void free(void* data, std::size_t bytes) noexcept override {
    if (!live_.contains(data) || live_[data] != bytes) std::abort();  // a slab freed wrongly
    live_.erase(data);
    used_ -= bytes;
    std::free(data);
  }
  void fill_zero(void* data, std::size_t bytes, void*) override { std::memset(data, 0, bytes); }
  void copy(void* target, const void* source, std::size_t bytes, void*) override {
    std::memcpy(target, source, bytes);
  }
  void synchronize(void* stream) override { waits.push_back(stream); }
  std::size_t free_bytes() const override { return capacity_ - used_; }
  std::size_t total_bytes() const override { return capacity_; }
  std::size_t num_live() const { return live_.size(); }

  bool fail_next = false;
  int num_allocations = 0;
  std::vector<void*> waits;

 private:
  const std::size_t capacity_;
  std::size_t used_ = 0;
  std::map<void*, std::size_t> live_;
};

}  // namespace fastgpt::test
