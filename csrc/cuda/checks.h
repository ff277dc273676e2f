// SPDX-License-Identifier: Apache-2.0
// Checks of launch arguments: the first one that fails leaves its message in this thread.
#pragma once

#include <cstdint>
#include <cstdio>

#include "interface.h"

namespace stamina::cuda {

constexpr int64_t kLargestInt32 = 0x7FFFFFFF;

inline thread_local char last_error[256] = "";

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t bytes_of(int64_t dtype) { return dtype == STAMINA_FLOAT32 ? 4 : 2; }

// `where` and `index` name what holds the argument: "members", 3 for members[3].
class Checks {
 public:
  explicit Checks(const char* where = "", int64_t index = -1) : where_(where), index_(index) {}

  bool ok() const { return ok_; }

  Checks& pointer(const char* name, const void* p, int64_t alignment) {
    if (p == nullptr) return fail(name, "must not be null");
    return optional_pointer(name, p, alignment);
  }
  Checks& optional_pointer(const char* name, const void* p, int64_t alignment) {
    if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(alignment) == 0) return *this;
    return fail(name, "must be aligned to %lld bytes", alignment);
  }
  Checks& size(const char* name, int64_t n, int64_t least, int64_t most = kLargestInt32) {
    if (n < least) return fail(name, "must be at least %lld", least);
    return n > most ? fail(name, "must be at most %lld", most) : *this;
  }
  Checks& dtype(const char* name, int64_t value) {
    if (value >= STAMINA_FLOAT32 && value <= STAMINA_FLOAT16) return *this;
    return fail(name, "must be 0 (fp32), 1 (bf16) or 2 (fp16)");
  }
  Checks& require(const char* name, bool holds, const char* what) {
    return holds ? *this : fail(name, what);
  }

 private:
  Checks& fail(const char* name, const char* format, int64_t value = 0) {
    if (!ok_) return *this;
    ok_ = false;
    char what[96];
    std::snprintf(what, sizeof what, format, static_cast<long long>(value));
    if (index_ < 0) {
      std::snprintf(last_error, sizeof last_error, "%s %s", name, what);
    } else {
      std::snprintf(last_error, sizeof last_error, "%s[%lld].%s %s", where_,
                    static_cast<long long>(index_), name, what);
    }
    return *this;
  }

  const char* where_;
  int64_t index_;
  bool ok_ = true;
};

inline int status_of(const char* cuda_error) {
  if (cuda_error == nullptr) return STAMINA_OK;
  std::snprintf(last_error, sizeof last_error, "%s", cuda_error);
  return STAMINA_CUDA_ERROR;
}

}  // namespace stamina::cuda
