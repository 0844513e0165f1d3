#include "fastgpt/weight_window.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "fastgpt/arena.h"
#include "fastgpt/check.h"
#include "fastgpt/fake_upstream.h"

namespace fastgpt {
namespace {

void* stream(std::uintptr_t id) { return reinterpret_cast<void*>(id); }

/// Parts of one piece each, the bytes of part i all i + 1, on the fake device.
struct Streaming {
  explicit Streaming(const std::vector<std::size_t>& sizes, std::uint64_t seed = 1,
                     std::size_t chunk_bytes = 1000)
      : upstream(std::make_shared<FakeUpstream>(FakeUpstream::Options{.seed = seed})),
        arena(upstream, std::size_t{64} << 20, ArenaOptions{.handle_bytes = 2 << 20}) {
    std::vector<WeightWindow::Part> parts;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      void* const host = arena.allocate(sizes[i], stream(9));
      upstream->write(host, sizes[i], std::uint8_t(i + 1), stream(9));
      parts.push_back({{host, sizes[i]}});
      bytes.push_back(sizes[i]);
    }
    upstream->synchronize_device();
    const std::size_t window_bytes = WeightWindow::bytes_for(parts);
    memory = arena.allocate(window_bytes, stream(1));
    window = std::make_unique<WeightWindow>(upstream, memory, window_bytes, parts, chunk_bytes);
  }
  ~Streaming() {
    window.reset();
    upstream->run_all();
    EXPECT_TRUE(upstream->violations().empty()) << upstream->violations().front();
  }

  void pass(void* on) {
    window->begin(on);
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      window->acquire(i, on);
      upstream->expect(window->address(i, 0), bytes[i], std::uint8_t(i + 1), on);
      window->release(i, on);
      upstream->run(3);
    }
  }

  std::shared_ptr<FakeUpstream> upstream;
  Arena arena;
  void* memory = nullptr;
  std::vector<std::size_t> bytes;
  std::unique_ptr<WeightWindow> window;
};

TEST(WeightWindowTest, EveryPartIsThereWhenItsTurnComesHoweverStreamsRun) {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    Streaming model({5000, 70000, 1, 30000, 256, 70001, 9000}, seed);
    for (int i = 0; i < 4; ++i) model.pass(stream(1));
  }
}

TEST(WeightWindowTest, NeighboursDoNotShareBytesAndAddressesStay) {
  const std::vector<std::size_t> sizes{50 << 10, 60 << 10, 70 << 10, 300, 128 << 10};
  Streaming model(sizes);
  std::vector<std::uintptr_t> at;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    at.push_back(reinterpret_cast<std::uintptr_t>(model.window->address(i, 0)));
    EXPECT_EQ(at[i] % kArenaAlignment, 0u);
    if (i > 0) EXPECT_TRUE(at[i] >= at[i - 1] + sizes[i - 1] || at[i - 1] >= at[i] + sizes[i]);
  }
  model.pass(stream(1));
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(model.window->address(i, 0)), at[i]);
  }
}

TEST(WeightWindowTest, OnePartAndAPassGivenUp) {
  Streaming one({12345});
  one.pass(stream(1));
  Streaming model({4000, 5000, 6000, 7000});
  model.window->begin(stream(1));
  model.window->acquire(0, stream(1));
  model.pass(stream(1));
}

TEST(WeightWindowTest, AFailedCallLeavesNothingBehindAndTheNextPassIsRight) {
  for (std::uint64_t call = 1; call < 40; ++call) {
    Streaming model({4000, 5000, 6000});
    model.upstream->fail_at(call);
    try {
      model.pass(stream(1));
    } catch (const Error&) {
    }
    model.upstream->fail_at(0);
    model.pass(stream(1));
    std::vector<WeightWindow::Part> parts{{{model.memory, 10}}};
    model.upstream->fail_at(call);
    try {
      WeightWindow(model.upstream, model.memory, 256, parts);
    } catch (const Error&) {
    }
    model.upstream->fail_at(0);
  }
}

TEST(WeightWindowTest, PiecesOfOnePartLieApart) {
  auto upstream = make_host_upstream();
  std::vector<char> a(100, 'a');
  std::vector<char> b(200, 'b');
  std::vector<char> c(1, 'c');
  std::vector<WeightWindow::Part> parts{{{a.data(), 100}, {b.data(), 200}}, {{c.data(), 1}}};
  ASSERT_EQ(WeightWindow::bytes_for(parts), 256u + 256u + 256u);
  Arena arena(upstream, 1 << 20);
  void* memory = arena.allocate(768, nullptr);
  WeightWindow window(upstream, memory, 768, parts, 64);
  EXPECT_EQ(window.bytes_per_pass(), 301u);
  window.begin(nullptr);
  window.acquire(0, nullptr);
  EXPECT_EQ(std::memcmp(window.address(0, 0), a.data(), 100), 0);
  EXPECT_EQ(std::memcmp(window.address(0, 1), b.data(), 200), 0);
  window.release(0, nullptr);
  window.acquire(1, nullptr);
  EXPECT_EQ(*static_cast<char*>(window.address(1, 0)), 'c');
  window.release(1, nullptr);
}

TEST(WeightWindowTest, RefusesWhatCannotWork) {
  auto upstream = make_host_upstream();
  std::vector<char> bytes(1000);
  EXPECT_THROW(WeightWindow(upstream, bytes.data(), 1000, {}), InvalidArgument);
  EXPECT_THROW(WeightWindow(upstream, bytes.data(), 1000, {{}}), InvalidArgument);
  EXPECT_THROW(WeightWindow(upstream, bytes.data(), 1000, {{{bytes.data(), 1001}}}),
               InvalidArgument);
  Streaming model({100, 200, 300});
  model.window->begin(stream(1));
  EXPECT_THROW(model.window->acquire(1, stream(1)), InvalidArgument);
  EXPECT_THROW(model.window->release(0, stream(1)), InvalidArgument);
  model.window->acquire(0, stream(1));
  EXPECT_THROW(model.window->acquire(1, stream(1)), InvalidArgument);
  EXPECT_THROW(model.window->address(3, 0), InvalidArgument);
}

}  // namespace
}  // namespace fastgpt
