#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace pvk {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

CpuCapability best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return CpuCapability::kAvx512;
  if (avx2) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kBaseline;
}

std::atomic<int> current{static_cast<int>(best())};

bool best_has_bfloat16_dot() {
#if defined(__x86_64__)
  return best() == CpuCapability::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

std::atomic<bool> bfloat16_dot{best_has_bfloat16_dot()};

}  // namespace

CpuCapability cpu_capability() {
  return static_cast<CpuCapability>(current.load(std::memory_order_relaxed));
}

bool cpu_has_bfloat16_dot() {
  return cpu_capability() == CpuCapability::kAvx512 && bfloat16_dot.load(std::memory_order_relaxed);
}

}  // namespace pvk

// C interface of the CPU library, used by pyvision_kernels._extension.

extern "C" __attribute__((visibility("default"))) const char* pvk_cpu_capability() {
  return pvk::kNames[static_cast<int>(pvk::cpu_capability())];
}

extern "C" __attribute__((visibility("default"))) const char* pvk_cpu_best_capability() {
  return pvk::kNames[static_cast<int>(pvk::best())];
}

// Returns 0, or 1 where the name is unknown, or 2 where this CPU lacks it.
extern "C" __attribute__((visibility("default"))) int pvk_set_cpu_capability(const char* name) {
  for (int level = 0; level < 3; ++level) {
    if (std::strcmp(name, pvk::kNames[level]) != 0) continue;
    if (level > static_cast<int>(pvk::best())) return 2;
    pvk::current.store(level, std::memory_order_relaxed);
    return 0;
  }
  return 1;
}

// Returns 0, or 2 where this CPU lacks them.
extern "C" __attribute__((visibility("default"))) int pvk_set_cpu_bfloat16_dot(int on) {
  if (on && !pvk::best_has_bfloat16_dot()) return 2;
  pvk::bfloat16_dot.store(on != 0, std::memory_order_relaxed);
  return 0;
}
