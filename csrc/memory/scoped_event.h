// An event for one wait.
#pragma once
#include <utility>

#include "fastgpt/upstream.h"

namespace fastgpt::memory {

class ScopedEvent {
 public:
  explicit ScopedEvent(Upstream& upstream) : upstream_(upstream), event_(upstream.create_event()) {}
  ~ScopedEvent() {
    if (event_ != nullptr) upstream_.destroy_event(event_);
  }
  ScopedEvent(const ScopedEvent&) = delete;
  ScopedEvent& operator=(const ScopedEvent&) = delete;
  Event get() const { return event_; }
  Event release() { return std::exchange(event_, nullptr); }

 private:
  Upstream& upstream_;
  Event event_;
};

}  // namespace fastgpt::memory
