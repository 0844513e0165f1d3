#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>

#include "fastgpt/upstream.h"

namespace fastgpt {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t available_bytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  std::size_t kib = 0;
  std::string unit;
  while (meminfo >> key >> kib && std::getline(meminfo, unit)) {
    if (key == "MemAvailable:") return kib << 10;
  }
  return 0;
}

class HostUpstream final : public Upstream {
 public:
  DeviceType device_type() const override { return DeviceType::kCPU; }
  int device() const override { return 0; }

  // Mapped one huge page too long, so that the start can be aligned: streaming weights through
  // 4 KiB pages costs a page walk every 4 KiB.
  void* allocate(std::size_t bytes) override {
    const std::size_t length = mapped_length(bytes);
    void* raw = mmap(nullptr, length + kHugePage, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    auto* base = static_cast<std::byte*>(raw);
    const std::size_t head =
        (kHugePage - reinterpret_cast<std::uintptr_t>(base) % kHugePage) % kHugePage;
    if (head > 0) munmap(base, head);
    if (head < kHugePage) munmap(base + head + length, kHugePage - head);
    madvise(base + head, length, MADV_HUGEPAGE);  // refused: ordinary pages serve as well
    return base + head;
  }

  void free(void* data, std::size_t bytes) noexcept override { munmap(data, mapped_length(bytes)); }

  void fill_zero(void* data, std::size_t bytes, void*) override { std::memset(data, 0, bytes); }

  void copy(void* target, const void* source, std::size_t bytes, void*) override {
    std::memcpy(target, source, bytes);
  }

  void synchronize(void*) override {}

  std::size_t free_bytes() const override { return available_bytes(); }

  std::size_t total_bytes() const override {
    return std::size_t(sysconf(_SC_PHYS_PAGES)) * std::size_t(sysconf(_SC_PAGESIZE));
  }

 private:
  static std::size_t mapped_length(std::size_t bytes) {
    return (std::max<std::size_t>(bytes, 1) + kHugePage - 1) / kHugePage * kHugePage;
  }
};

}  // namespace

std::shared_ptr<Upstream> make_host_upstream() { return std::make_shared<HostUpstream>(); }

#ifndef FASTGPT_WITH_CUDA
std::shared_ptr<Upstream> make_cuda_upstream(int device) {
  detail::fail<DeviceError>(__FILE__, __LINE__, "cuda:", device,
                            " was asked for, but this build has no CUDA; rebuild with nvcc and "
                            "FASTGPT_CUDA=1");
}
#endif

}  // namespace fastgpt
