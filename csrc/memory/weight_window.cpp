#include "fastgpt/weight_window.h"

#include <algorithm>

#include "fastgpt/arena.h"
#include "fastgpt/check.h"

namespace fastgpt {
namespace {

std::size_t aligned(std::size_t bytes) {
  return (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
}

std::size_t part_bytes(const WeightWindow::Part& part) {
  std::size_t bytes = 0;
  for (const WeightWindow::Piece& piece : part) bytes += aligned(piece.bytes);
  return bytes;
}

}  // namespace

std::size_t WeightWindow::bytes_for(const std::vector<Part>& parts) {
  std::size_t bytes = 0;
  std::size_t before = 0;
  for (const Part& part : parts) {
    const std::size_t own = part_bytes(part);
    bytes = std::max(bytes, before + own);
    before = own;
  }
  return bytes;
}

WeightWindow::WeightWindow(std::shared_ptr<Upstream> upstream, void* window, std::size_t bytes,
                           std::vector<Part> parts, std::size_t chunk_bytes)
    : upstream_(std::move(upstream)),
      window_(static_cast<std::byte*>(window)),
      chunk_bytes_(chunk_bytes) {
  FASTGPT_CHECK(!parts.empty(), "a window needs at least one part");
  FASTGPT_CHECK(chunk_bytes > 0, "chunk_bytes is 0; expected a positive size");
  const std::size_t needed = bytes_for(parts);
  FASTGPT_CHECK(bytes >= needed, "the window has ", bytes, " bytes; its parts need ", needed);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    FASTGPT_CHECK(!parts[i].empty(), "part ", i, " has no pieces; leave it out");
    Placed placed;
    std::size_t offset =
        i % 2 == 0 ? 0 : bytes / kArenaAlignment * kArenaAlignment - part_bytes(parts[i]);
    for (const Piece& piece : parts[i]) {
      FASTGPT_CHECK(piece.bytes > 0, "part ", i, " has an empty piece; leave it out");
      placed.offsets.push_back(offset);
      offset += aligned(piece.bytes);
    }
    placed.pieces = std::move(parts[i]);
    parts_.push_back(std::move(placed));
  }
  // All before the first pass: a captured pass must not create anything.
  try {
    copies_ = upstream_->create_stream();
    begun_ = upstream_->create_event();
    for (Placed& part : parts_) {
      part.ready = upstream_->create_event();
      part.released = upstream_->create_event();
    }
  } catch (...) {
    close();
    throw;
  }
}

WeightWindow::~WeightWindow() { close(); }

void WeightWindow::close() noexcept {
  try {
    if (copies_ != nullptr && begun_ != nullptr) {  // nothing may write to the window any more
      upstream_->record(begun_, copies_);
      upstream_->synchronize(begun_);
    }
  } catch (const std::exception&) {  // the device is gone, and its copies with it
  }
  for (Placed& part : parts_) {
    if (part.ready != nullptr) upstream_->destroy_event(part.ready);
    if (part.released != nullptr) upstream_->destroy_event(part.released);
  }
  if (begun_ != nullptr) upstream_->destroy_event(begun_);
  if (copies_ != nullptr) upstream_->destroy_stream(copies_);
}

void* WeightWindow::address(std::size_t part, std::size_t piece) const {
  FASTGPT_CHECK(part < parts_.size() && piece < parts_[part].offsets.size(), "there is no piece ",
                piece, " of part ", part);
  return window_ + parts_[part].offsets[piece];
}

std::size_t WeightWindow::bytes_per_pass() const {
  std::size_t bytes = 0;
  for (const Placed& part : parts_) {
    for (const Piece& piece : part.pieces) bytes += piece.bytes;
  }
  return bytes;
}

void WeightWindow::begin(void* stream) {
  num_copied_ = num_released_ = num_acquired_ = 0;
  upstream_->record(begun_, stream);
  upstream_->wait(copies_, begun_);
  copy_what_fits();
}

// Part i lies where part i - 2 lay.
void WeightWindow::copy_what_fits() {
  while (num_copied_ < parts_.size() && num_copied_ < num_released_ + 2) {
    Placed& part = parts_[num_copied_];
    if (num_copied_ >= 2) upstream_->wait(copies_, parts_[num_copied_ - 2].released);
    for (std::size_t i = 0; i < part.pieces.size(); ++i) {
      const auto* const from = static_cast<const std::byte*>(part.pieces[i].host);
      const std::size_t bytes = part.pieces[i].bytes;
      for (std::size_t at = 0; at < bytes; at += chunk_bytes_) {
        upstream_->copy(window_ + part.offsets[i] + at, from + at,
                        std::min(chunk_bytes_, bytes - at), copies_);
      }
    }
    upstream_->record(part.ready, copies_);
    ++num_copied_;
  }
}

void WeightWindow::acquire(std::size_t part, void* stream) {
  FASTGPT_CHECK(part < parts_.size() && part == num_acquired_ && part == num_released_, "part ",
                part, " of ", parts_.size(), " is acquired when part ", num_released_,
                num_acquired_ > num_released_ ? " is in use" : " is next");
  upstream_->wait(stream, parts_[part].ready);
  ++num_acquired_;
}

void WeightWindow::release(std::size_t part, void* stream) {
  FASTGPT_CHECK(part == num_released_ && num_acquired_ > part, "part ", part, " is not acquired");
  upstream_->record(parts_[part].released, stream);
  ++num_released_;
  copy_what_fits();
}

}  // namespace fastgpt
