// fastgpt._C.MemoryPool: the layer cache, its buffers leaving as DLPack capsules of bytes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "bindings/dlpack.h"
#include "bindings/module.h"
#include "fastgpt/layer_cache.h"

namespace py = pybind11;

namespace fastgpt::bindings {
namespace {

/// What a capsule owns: the structure handed out and the lease that ends with it.
struct ManagedLease {
  DLManagedTensor managed{};
  std::int64_t num_bytes = 0;
  std::unique_ptr<Lease> lease;
};

py::capsule to_capsule(std::unique_ptr<Lease> lease, const Upstream& upstream) {
  auto owner = std::make_unique<ManagedLease>();
  owner->num_bytes = std::int64_t(lease->bytes());
  const bool cpu = upstream.device_type() == DeviceType::kCPU;
  owner->managed.dl_tensor = {
      lease->data(), {cpu ? 1 : 2, upstream.device()}, 1, {1, 8, 1}, &owner->num_bytes, nullptr, 0};
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

class MemoryPool {
 public:
  MemoryPool(int cuda_device, std::size_t budget_bytes, std::size_t handle_bytes)
      : cache_(std::make_shared<LayerCache>(std::make_unique<Arena>(
            cuda_device < 0 ? make_host_upstream() : make_cuda_upstream(cuda_device), budget_bytes,
            options(cuda_device, handle_bytes)))) {}

  py::capsule allocate(std::size_t bytes, const std::string& name, const std::string& layout,
                       int contents, std::uintptr_t stream) {
    std::unique_ptr<Lease> lease;
    {
      py::gil_scoped_release release;
      lease = cache_->allocate(bytes, name, layout, Contents(contents), as_stream(stream));
    }
    return to_capsule(std::move(lease), cache_->arena().upstream());
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
    out["fragmentation"] = s.fragmentation();
    out["fragmentation_now"] = s.fragmentation_now();
    return out;
  }

  py::list entries() const {
    py::list out;
    for (const EntryInfo& entry : cache_->entries()) {
      out.append(py::make_tuple(entry.name, entry.bytes, entry.num_leases));
    }
    return out;
  }

  bool contains(const std::string& name) const { return cache_->contains(name); }
  std::size_t trim() { return cache_->arena().trim(); }
  void reset_peaks() { cache_->arena().reset_peaks(); }
  void check_integrity() const { cache_->arena().check_integrity(); }

 private:
  // The driver takes milliseconds to map while kernels run: one handle stays mapped ahead. On the
  // host mapping is a promise and costs nothing.
  static ArenaOptions options(int cuda_device, std::size_t handle_bytes) {
    return {.handle_bytes = handle_bytes, .ahead_bytes = cuda_device < 0 ? 0 : handle_bytes};
  }

  std::shared_ptr<LayerCache> cache_;
};

}  // namespace

void bind_memory(py::module_& m) {
  py::class_<MemoryPool>(m, "MemoryPool")
      .def(py::init<int, std::size_t, std::size_t>(), py::arg("cuda_device"),
           py::arg("budget_bytes"), py::arg("handle_bytes"))
      .def("allocate", &MemoryPool::allocate, py::arg("bytes"), py::arg("name"), py::arg("layout"),
           py::arg("contents"), py::arg("stream"))
      .def("free", &MemoryPool::free, py::arg("name"), py::arg("stream"))
      .def("stats", &MemoryPool::stats)
      .def("entries", &MemoryPool::entries)
      .def("contains", &MemoryPool::contains, py::arg("name"))
      .def("trim", &MemoryPool::trim)
      .def("reset_peaks", &MemoryPool::reset_peaks)
      .def("check_integrity", &MemoryPool::check_integrity);
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
