// fastgpt._C.FakeDevice: a pool on a device that exists only in memory, for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings/module.h"
#include "fastgpt/fake_upstream.h"
#include "fastgpt/layer_cache.h"

namespace py = pybind11;

namespace fastgpt::bindings {
namespace {

using Address = std::uintptr_t;

void* as_pointer(Address address) { return reinterpret_cast<void*>(address); }
Address as_address(const void* pointer) { return reinterpret_cast<Address>(pointer); }

/// A fake driver, a layer cache on it and the host memory it evicts to. One thread at a time.
class FakeDevice {
 public:
  FakeDevice(std::size_t budget_bytes, std::size_t host_bytes, std::size_t granularity,
             std::size_t handle_bytes, std::size_t chunk_bytes, bool evict_when_full,
             bool use_lanes, std::uint64_t seed)
      : driver_(std::make_shared<FakeUpstream>(
            FakeUpstream::Options{4 * (budget_bytes + host_bytes), true, granularity, seed})) {
    const auto make_arena = [&](std::size_t bytes) {
      driver_->limit_next_reservation(bytes);
      return std::make_unique<Arena>(
          driver_, bytes, ArenaOptions{.handle_bytes = handle_bytes, .use_lanes = use_lanes});
    };
    host_ = make_arena(host_bytes);
    cache_ = std::make_shared<LayerCache>(make_arena(budget_bytes),
                                          SwapOptions{host_, evict_when_full, chunk_bytes});
  }

  // -- the pool
  // ------------------------------------------------------------------------------------

  std::unique_ptr<Lease> allocate(std::size_t bytes, const std::string& name,
                                  const std::string& layout, int contents, Address stream) {
    return cache_->allocate(bytes, name, layout, Contents(contents), as_pointer(stream));
  }
  LayerCache& cache() { return *cache_; }
  Arena& arena() { return cache_->arena(); }

  // (requested, blocks, reserved, sum of the parts of reserved) of the device's arena.
  std::vector<std::size_t> counts() {
    const ArenaStats s = arena().stats();
    return {s.requested_bytes, s.num_blocks, s.reserved_bytes,
            s.requested_bytes + s.rounding_bytes + s.pending_bytes + s.returnable_bytes +
                s.scattered_bytes + s.lane_bytes + s.evicted_bytes};
  }
  void check_integrity() {
    arena().check_integrity();
    host_->check_integrity();
  }
  std::size_t host_requested_bytes() const { return host_->stats().requested_bytes; }
  /// Leases outlive the pool.
  void drop() { cache_.reset(); }

  FakeUpstream& driver() { return *driver_; }

 private:
  std::shared_ptr<FakeUpstream> driver_;
  std::shared_ptr<Arena> host_;
  std::shared_ptr<LayerCache> cache_;
};

}  // namespace

void bind_fake(py::module_& m) {
  py::class_<Lease>(m, "FakeLease")
      .def_property_readonly("data", [](const Lease& l) { return as_address(l.data()); })
      .def_property_readonly("bytes", &Lease::bytes);
  using D = FakeDevice;
  using A = Address;
  py::class_<FakeDevice>(m, "FakeDevice")
      .def(py::init<std::size_t, std::size_t, std::size_t, std::size_t, std::size_t, bool, bool,
                    std::uint64_t>(),
           py::kw_only(), py::arg("budget_bytes"), py::arg("host_bytes"), py::arg("granularity"),
           py::arg("handle_bytes"), py::arg("chunk_bytes"), py::arg("evict_when_full"),
           py::arg("use_lanes"), py::arg("seed"))
      // the layer cache
      .def("allocate", &D::allocate)
      .def("free", [](D& d, const std::string& n, A s) { d.cache().free(n, as_pointer(s)); })
      .def("pin", [](D& d, const std::string& n) { d.cache().pin(n); })
      .def("unpin", [](D& d, const std::string& n) { d.cache().unpin(n); })
      .def("freeze", [](D& d, const std::string& n) { d.cache().freeze(n); })
      .def("thaw", [](D& d, const std::string& n) { d.cache().thaw(n); })
      .def("evict", [](D& d, const std::string& n) { d.cache().evict(n); })
      .def("restore", [](D& d, const std::string& n, A s) { d.cache().restore(n, as_pointer(s)); })
      .def("acquire", [](D& d, const std::string& n, A s) { d.cache().acquire(n, as_pointer(s)); })
      .def("release", [](D& d, const std::string& n, A s) { d.cache().release(n, as_pointer(s)); })
      .def("set_schedule",
           [](D& d, const std::vector<std::string>& names) { d.cache().set_schedule(names); })
      .def("record_use",
           [](D& d, A data, A s) { d.cache().record_use_of(as_pointer(data), as_pointer(s)); })
      .def("release_stream", [](D& d, A s) { d.cache().release_stream(as_pointer(s)); })
      .def("trim", [](D& d) { return d.cache().trim(); })
      .def("entries",
           [](D& d) {
             std::vector<std::tuple<std::string, std::size_t, int, bool>> entries;
             for (const EntryInfo& e : d.cache().entries()) {
               entries.emplace_back(e.name, e.bytes, e.num_leases, e.is_evicted);
             }
             return entries;
           })
      .def("num_clean_evictions", [](D& d) { return d.cache().swap_stats().num_clean_evictions; })
      .def("drop", &D::drop)
      // the arena below it
      .def("block_allocate",
           [](D& d, std::size_t bytes, A s) {
             return as_address(d.arena().allocate(bytes, as_pointer(s)));
           })
      .def("block_free", [](D& d, A data, A s) { d.arena().free(as_pointer(data), as_pointer(s)); })
      .def("block_grow", [](D& d, A data, std::size_t bytes,
                            A s) { return d.arena().grow(as_pointer(data), bytes, as_pointer(s)); })
      .def("block_record_use",
           [](D& d, A data, A s) { d.arena().record_use(as_pointer(data), as_pointer(s)); })
      .def("block_evict", [](D& d, A data) { d.arena().evict(as_pointer(data)); })
      .def("block_restore", [](D& d, A data) { d.arena().restore(as_pointer(data)); })
      .def("counts", &D::counts)
      .def("host_requested_bytes", &D::host_requested_bytes)
      .def("check_integrity", &D::check_integrity)
      // the driver
      .def("create_stream", [](D& d) { return as_address(d.driver().create_stream()); })
      .def("destroy_stream", [](D& d, A s) { d.driver().destroy_stream(as_pointer(s)); })
      .def("begin_capture", [](D& d, A s) { d.driver().begin_capture(as_pointer(s)); })
      .def("end_capture", [](D& d, A s) { d.driver().end_capture(as_pointer(s)); })
      .def("write",
           [](D& d, A data, std::size_t bytes, int stamp, A s) {
             d.driver().write(as_pointer(data), bytes, std::uint8_t(stamp), as_pointer(s));
           })
      .def("expect",
           [](D& d, A data, std::size_t bytes, int stamp, A s) {
             d.driver().expect(as_pointer(data), bytes, std::uint8_t(stamp), as_pointer(s));
           })
      .def("order", [](D& d, A a, A b) { d.driver().order(as_pointer(a), as_pointer(b)); })
      .def("synchronize", [](D& d) { d.driver().synchronize_device(); })
      .def("run", [](D& d, std::size_t steps) { d.driver().run(steps); })
      .def("run_all", [](D& d) { d.driver().run_all(); })
      .def("fail_at", [](D& d, std::uint64_t call, std::uint64_t num,
                         bool throws) { d.driver().fail_at(call, num, throws); })
      .def("is_mapped",
           [](D& d, A data, std::size_t n) { return d.driver().is_mapped(as_pointer(data), n); })
      .def("created_bytes", [](D& d) { return d.driver().total_bytes() - d.driver().free_bytes(); })
      .def("mapped_bytes", [](D& d) { return d.driver().mapped_bytes(); })
      .def("num_events", [](D& d) { return d.driver().num_events(); })
      .def("violations", [](D& d) { return d.driver().violations(); });
}

}  // namespace fastgpt::bindings
