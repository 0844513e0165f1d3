#include "fastgpt/trace.h"

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "fastgpt/check.h"

namespace fastgpt {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

std::string escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof(code), "\\u%04x", c);
      out += code;
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

void Trace::start(const std::string& path) {
  std::lock_guard lock(mutex_);
  FASTGPT_CHECK(file_ == nullptr, "a trace is running already; stop it first");
  std::FILE* const file = std::fopen(path.c_str(), "w");
  FASTGPT_CHECK(file != nullptr, "the trace file '", path,
                "' cannot be written: ", std::strerror(errno));
  std::setvbuf(file, nullptr, _IOFBF, kBufferBytes);
  file_ = file;
  began_ = std::chrono::steady_clock::now();
  streams_.clear();
  threads_.clear();
  is_on_ = true;
}

void Trace::stop() noexcept {
  std::lock_guard lock(mutex_);
  is_on_ = false;
  if (file_ != nullptr) std::fclose(file_);
  file_ = nullptr;
}

void Trace::write(const char* op, const void* id, std::size_t bytes, const void* stream,
                  std::string_view name) {
  const std::string text = escape(name);
  std::lock_guard lock(mutex_);
  if (file_ == nullptr) return;  // stopped meanwhile
  const std::chrono::duration<double, std::micro> t = std::chrono::steady_clock::now() - began_;
  const std::size_t stream_number = streams_.try_emplace(stream, streams_.size()).first->second;
  const std::size_t thread_number =
      threads_.try_emplace(std::this_thread::get_id(), threads_.size()).first->second;
  std::fprintf(file_,
               "{\"t_us\": %.3f, \"op\": \"%s\", \"id\": %llu, \"bytes\": %zu, \"stream\": %zu, "
               "\"thread\": %zu, \"name\": \"%s\"}\n",
               t.count(), op, static_cast<unsigned long long>(reinterpret_cast<std::uintptr_t>(id)),
               bytes, stream_number, thread_number, text.c_str());
}

}  // namespace fastgpt
