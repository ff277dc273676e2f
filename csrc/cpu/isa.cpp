// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set at run time.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace stamina {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
Kernels with_pairs(Kernels kernels, const char* name, const PairProducts* pairs) {
  kernels.name = name;
  kernels.pairs = pairs;
  return kernels;
}
#endif

// Widest first.
const Candidate* candidates(int* count) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c");
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const Kernels avx512_bf16 = with_pairs(avx512::kernels, "avx512_bf16", &avx512::pairs);
  static const Candidate all[] = {{&avx512_bf16, bf16},
                                  {&avx512::kernels, avx512},
                                  {&avx2::kernels, avx2},
                                  {&portable::kernels, true}};
#else
  static const Candidate all[] = {{&portable::kernels, true}};
#endif
  *count = static_cast<int>(sizeof all / sizeof all[0]);
  return all;
}

// name null or empty: the widest.
const Kernels* find(const char* name) {
  int count;
  const Candidate* all = candidates(&count);
  std::string supported;
  for (int i = 0; i < count; ++i) {
    if (!all[i].supported) continue;
    if (name == nullptr || *name == '\0' || std::strcmp(name, all[i].kernels->name) == 0)
      return all[i].kernels;
    supported += std::string(supported.empty() ? "" : ", ") + all[i].kernels->name;
  }
  throw std::runtime_error("STAMINA_CPU_ISA must be one of " + supported +
                           " on this machine, got '" + name + "'");
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = find(std::getenv("STAMINA_CPU_ISA"));
    active.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void select_kernels(const char* name) { active.store(find(name), std::memory_order_release); }

}  // namespace stamina
