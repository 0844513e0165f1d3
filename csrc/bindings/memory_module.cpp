// fastgpt._C.MemoryPool: the layer cache, its buffers leaving as DLPack capsules.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>

#include "bindings/dlpack.h"
#include "bindings/module.h"
#include "fastgpt/c_allocator.h"
#include "fastgpt/check.h"
#include "fastgpt/layer_cache.h"
#include "fastgpt/weight_window.h"

namespace py = pybind11;

namespace fastgpt::bindings {
namespace {

/// What a capsule owns: the structure handed out and the lease that ends with it.
struct ManagedLease {
  DLManagedTensor managed{};
  std::vector<std::int64_t> shape;
  std::unique_ptr<Lease> lease;
};

py::capsule to_capsule(std::unique_ptr<Lease> lease, std::vector<std::int64_t> shape,
                       DLDataType dtype, const Upstream& upstream) {
  auto owner = std::make_unique<ManagedLease>();
  owner->shape = std::move(shape);
  const bool cpu = upstream.device_type() == DeviceType::kCPU;
  owner->managed.dl_tensor = {lease->data(),
                              {cpu ? 1 : 2, upstream.device()},
                              int(owner->shape.size()),
                              dtype,
                              owner->shape.data(),
                              nullptr,
                              0};
  owner->managed.manager_ctx = owner.get();
  owner->managed.deleter = [](DLManagedTensor* self) {
    delete static_cast<ManagedLease*>(self->manager_ctx);
  };
  owner->lease = std::move(lease);
  // A capsule that nobody consumed still carries its name; a consumer renames it.
  return py::capsule(&owner.release()->managed, "dltensor", [](PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

void* as_stream(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }

std::shared_ptr<LayerCache> make_cache(int cuda_device, std::size_t budget_bytes,
                                       std::size_t handle_bytes, std::size_t host_bytes) {
  const bool cpu = cuda_device < 0;
  // The driver takes milliseconds to map while kernels run: one handle stays mapped ahead. On the
  // host mapping is a promise and costs nothing.
  const ArenaOptions options{.handle_bytes = handle_bytes, .ahead_bytes = cpu ? 0 : handle_bytes};
  SwapOptions swap;
  if (host_bytes > 0) {
    swap.host = std::make_shared<Arena>(
        cpu ? make_host_upstream() : make_pinned_upstream(cuda_device), host_bytes);
    swap.evict_when_full = true;
  }
  auto arena = std::make_unique<Arena>(cpu ? make_host_upstream() : make_cuda_upstream(cuda_device),
                                       budget_bytes, options);
  return std::make_shared<LayerCache>(std::move(arena), std::move(swap));
}

class MemoryPool {
 public:
  MemoryPool(int cuda_device, std::size_t budget_bytes, std::size_t handle_bytes,
             std::size_t host_bytes)
      : cache_(make_cache(cuda_device, budget_bytes, handle_bytes, host_bytes)) {}

  // dtype: DLPack's code and bits; bytes: of the whole shape.
  py::capsule allocate(std::vector<std::int64_t> shape, int code, int bits, std::size_t bytes,
                       const std::string& name, const std::string& layout, int contents,
                       std::uintptr_t stream) {
    std::unique_ptr<Lease> lease;
    {
      py::gil_scoped_release release;
      lease = cache_->allocate(bytes, name, layout, Contents(contents), as_stream(stream));
    }
    return to_capsule(std::move(lease), std::move(shape),
                      {std::uint8_t(code), std::uint8_t(bits), 1}, cache_->arena().upstream());
  }

  void free(const std::string& name, std::uintptr_t stream) {
    py::gil_scoped_release release;
    cache_->free(name, as_stream(stream));
  }

  py::dict stats() const {
    ArenaStats s;
    {
      py::gil_scoped_release release;
      s = cache_->arena().stats();
    }
    py::dict out;
    out["budget_bytes"] = s.budget_bytes;
    out["reserved_bytes"] = s.reserved_bytes;
    out["allocated_bytes"] = s.allocated_bytes;
    out["requested_bytes"] = s.requested_bytes;
    out["rounding_bytes"] = s.rounding_bytes;
    out["pending_bytes"] = s.pending_bytes;
    out["returnable_bytes"] = s.returnable_bytes;
    out["scattered_bytes"] = s.scattered_bytes;
    out["lane_bytes"] = s.lane_bytes;
    out["evicted_bytes"] = s.evicted_bytes;
    out["ahead_bytes"] = s.ahead_bytes;
    out["largest_free_bytes"] = s.largest_free_bytes;
    out["peak_requested_bytes"] = s.peak_requested_bytes;
    out["peak_allocated_bytes"] = s.peak_allocated_bytes;
    out["peak_reserved_bytes"] = s.peak_reserved_bytes;
    out["peak_touched_bytes"] = s.peak_touched_bytes;
    out["num_slabs"] = s.num_slabs;
    out["num_blocks"] = s.num_blocks;
    out["num_allocations"] = s.num_allocations;
    out["num_upstream_calls"] = s.num_upstream_calls;
    out["num_stream_waits"] = s.num_stream_waits;
    out["num_event_records"] = s.num_event_records;
    const SwapStats swap = cache_->swap_stats();
    out["host_bytes"] = swap.host_bytes;
    out["num_evictions"] = swap.num_evictions;
    out["num_clean_evictions"] = swap.num_clean_evictions;
    out["num_restores"] = swap.num_restores;
    out["fragmentation"] = s.fragmentation();
    out["fragmentation_now"] = s.fragmentation_now();
    return out;
  }

  py::list entries() const {
    py::list out;
    for (const EntryInfo& entry : cache_->entries()) {
      out.append(py::make_tuple(entry.name, entry.bytes, entry.num_leases, entry.is_evicted));
    }
    return out;
  }

  // [(address, bytes, [(address, bytes, requested, state), ...]), ...]
  py::list snapshot() const {
    static constexpr const char* kStates[] = {"free", "pending", "live", "lane", "evicted"};
    std::vector<SegmentInfo> segments;
    {
      py::gil_scoped_release release;
      segments = cache_->arena().snapshot();
    }
    py::list out;
    for (const SegmentInfo& segment : segments) {
      py::list blocks;
      for (const BlockInfo& block : segment.blocks) {
        blocks.append(py::make_tuple(block.address, block.bytes, block.requested_bytes,
                                     kStates[int(block.kind)]));
      }
      out.append(py::make_tuple(segment.address, segment.bytes, blocks));
    }
    return out;
  }

  void pin(const std::string& name) { cache_->pin(name); }
  void unpin(const std::string& name) { cache_->unpin(name); }
  void freeze(const std::string& name) { cache_->freeze(name); }
  void thaw(const std::string& name) { cache_->thaw(name); }
  void evict(const std::string& name) { cache_->evict(name); }
  void set_schedule(const std::vector<std::string>& names) { cache_->set_schedule(names); }
  void evict_all(const std::vector<std::string>& names) { cache_->evict_all(names); }
  void restore_all(const std::vector<std::string>& names, std::uintptr_t stream) {
    cache_->restore_all(names, as_stream(stream));
  }
  int open_c_allocator() {
    return fastgpt::open_c_allocator(std::shared_ptr<Arena>(cache_, &cache_->arena()));
  }
  const std::shared_ptr<LayerCache>& cache() const { return cache_; }
  void acquire(const std::string& name, std::uintptr_t stream) {
    cache_->acquire(name, as_stream(stream));
  }
  void release(const std::string& name, std::uintptr_t stream) {
    cache_->release(name, as_stream(stream));
  }
  void restore(const std::string& name, std::uintptr_t stream) {
    cache_->restore(name, as_stream(stream));
  }
  void record_use(std::uintptr_t data, std::uintptr_t stream) {
    cache_->record_use_of(reinterpret_cast<void*>(data), as_stream(stream));
  }
  void release_stream(std::uintptr_t stream) { cache_->release_stream(as_stream(stream)); }

  void start_trace(const std::string& path) { cache_->arena().trace().start(path); }
  void stop_trace() { cache_->arena().trace().stop(); }

  bool contains(const std::string& name) const { return cache_->contains(name); }
  std::size_t trim() { return cache_->trim(); }
  void reset_peaks() { cache_->arena().reset_peaks(); }
  void check_integrity() const { cache_->arena().check_integrity(); }

 private:
  std::shared_ptr<LayerCache> cache_;
};

/// A window over evicted, frozen entries, which stay in host memory while it lives.
class Window {
 public:
  Window(const MemoryPool& pool, std::uintptr_t data, std::size_t bytes,
         const std::vector<std::vector<std::string>>& names)
      : cache_(pool.cache()) {
    std::map<std::string, std::size_t> sizes;
    for (const EntryInfo& entry : cache_->entries()) sizes[entry.name] = entry.bytes;
    std::vector<WeightWindow::Part> parts;
    try {
      for (const auto& part_names : names) {
        WeightWindow::Part part;
        for (const std::string& name : part_names) {
          part.push_back({cache_->hold_host(name), sizes[name]});
          held_.push_back(name);
        }
        parts.push_back(std::move(part));
      }
      window_ = std::make_unique<WeightWindow>(
          std::shared_ptr<Upstream>(cache_, &cache_->arena().upstream()),
          reinterpret_cast<void*>(data), bytes, std::move(parts));
    } catch (...) {
      close();
      throw;
    }
  }
  ~Window() { close(); }
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  void close() {
    window_.reset();
    for (const std::string& name : held_) cache_->release_host(name);
    held_.clear();
  }
  std::uintptr_t address(std::size_t part, std::size_t piece) const {
    return reinterpret_cast<std::uintptr_t>(open().address(part, piece));
  }
  std::size_t bytes_per_pass() const { return open().bytes_per_pass(); }
  void begin(std::uintptr_t stream) { open().begin(as_stream(stream)); }
  void acquire(std::size_t part, std::uintptr_t stream) { open().acquire(part, as_stream(stream)); }
  void release(std::size_t part, std::uintptr_t stream) { open().release(part, as_stream(stream)); }

  static std::size_t bytes_for(const std::vector<std::vector<std::size_t>>& sizes) {
    std::vector<WeightWindow::Part> parts;
    for (const auto& part_sizes : sizes) {
      WeightWindow::Part part;
      for (const std::size_t bytes : part_sizes) part.push_back({nullptr, bytes});
      parts.push_back(std::move(part));
    }
    return WeightWindow::bytes_for(parts);
  }

 private:
  WeightWindow& open() const {
    FASTGPT_CHECK(window_ != nullptr, "the window is closed");
    return *window_;
  }

  const std::shared_ptr<LayerCache> cache_;
  std::vector<std::string> held_;
  std::unique_ptr<WeightWindow> window_;
};

}  // namespace

void bind_memory(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<MemoryPool>(m, "MemoryPool")
      .def(py::init<int, std::size_t, std::size_t, std::size_t>(), py::arg("cuda_device"),
           py::arg("budget_bytes"), py::arg("handle_bytes"), py::arg("host_bytes"))
      .def("allocate", &MemoryPool::allocate, py::arg("shape"), py::arg("code"), py::arg("bits"),
           py::arg("bytes"), py::arg("name"), py::arg("layout"), py::arg("contents"),
           py::arg("stream"))
      .def("free", &MemoryPool::free, py::arg("name"), py::arg("stream"))
      .def("stats", &MemoryPool::stats)
      .def("entries", &MemoryPool::entries)
      .def("snapshot", &MemoryPool::snapshot)
      .def("pin", &MemoryPool::pin, no_gil, py::arg("name"))
      .def("unpin", &MemoryPool::unpin, no_gil, py::arg("name"))
      .def("freeze", &MemoryPool::freeze, no_gil, py::arg("name"))
      .def("thaw", &MemoryPool::thaw, no_gil, py::arg("name"))
      .def("evict", &MemoryPool::evict, no_gil, py::arg("name"))
      .def("restore", &MemoryPool::restore, no_gil, py::arg("name"), py::arg("stream"))
      .def("acquire", &MemoryPool::acquire, no_gil, py::arg("name"), py::arg("stream"))
      .def("release", &MemoryPool::release, no_gil, py::arg("name"), py::arg("stream"))
      .def("set_schedule", &MemoryPool::set_schedule, no_gil, py::arg("names"))
      .def("evict_all", &MemoryPool::evict_all, no_gil, py::arg("names"))
      .def("restore_all", &MemoryPool::restore_all, no_gil, py::arg("names"), py::arg("stream"))
      .def("open_c_allocator", &MemoryPool::open_c_allocator)
      .def("record_use", &MemoryPool::record_use, no_gil, py::arg("data"), py::arg("stream"))
      .def("release_stream", &MemoryPool::release_stream, no_gil, py::arg("stream"))
      .def("start_trace", &MemoryPool::start_trace, py::arg("path"))
      .def("stop_trace", &MemoryPool::stop_trace)
      .def("contains", &MemoryPool::contains, py::arg("name"))
      .def("trim", &MemoryPool::trim)
      .def("reset_peaks", &MemoryPool::reset_peaks)
      .def("check_integrity", &MemoryPool::check_integrity);
  py::class_<Window>(m, "WeightWindow")
      .def(py::init<const MemoryPool&, std::uintptr_t, std::size_t,
                    const std::vector<std::vector<std::string>>&>(),
           py::arg("pool"), py::arg("data"), py::arg("bytes"), py::arg("names"))
      .def_static("bytes_for", &Window::bytes_for, py::arg("sizes"))
      .def("close", &Window::close, no_gil)
      .def("address", &Window::address, py::arg("part"), py::arg("piece"))
      .def_property_readonly("bytes_per_pass", &Window::bytes_per_pass)
      .def("begin", &Window::begin, no_gil, py::arg("stream"))
      .def("acquire", &Window::acquire, no_gil, py::arg("part"), py::arg("stream"))
      .def("release", &Window::release, no_gil, py::arg("part"), py::arg("stream"));
  m.def("close_c_allocator", &close_c_allocator, no_gil, py::arg("slot"));
  m.def(
      "device_memory",
      [](int cuda_device) {
        const auto upstream =
            cuda_device < 0 ? make_host_upstream() : make_cuda_upstream(cuda_device);
        return py::make_tuple(upstream->free_bytes(), upstream->total_bytes());
      },
      py::arg("cuda_device"), "(free, total) bytes of a device; -1 is the host.");
}

}  // namespace fastgpt::bindings
