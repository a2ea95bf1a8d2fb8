#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// AMX-TILE and AMX-BF16 in the CPU, tile state in what the system saves (XCR0), and this process allowed to use it.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return false;  // XGETBV
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

enum AmxLevel { kAmxOff, kAmxOfCpu, kAmxModel };

int amx_of_environment() {
  const char* const value = std::getenv("PVK_CPU_AMX");
  return value != nullptr && std::strcmp(value, "0") == 0 ? kAmxOff : kAmxOfCpu;
}

std::atomic<int> amx_level{amx_of_environment()};

}  // namespace

CpuCapability cpu_capability() {
  return static_cast<CpuCapability>(current.load(std::memory_order_relaxed));
}

bool cpu_has_bfloat16_dot() {
  return cpu_capability() == CpuCapability::kAvx512 && bfloat16_dot.load(std::memory_order_relaxed);
}

CpuAmx cpu_amx() {
  const int level = amx_level.load(std::memory_order_relaxed);
  if (level == kAmxOff || !cpu_has_bfloat16_dot()) return CpuAmx::kNone;
  if (level == kAmxModel) return CpuAmx::kModel;
  static const bool may = may_use_tiles();
  return may ? CpuAmx::kTiles : CpuAmx::kNone;
}

}  // namespace pvk

// C interface of the CPU library, used by pyvision_kernels._extension.

extern "C" __attribute__((visibility("default"))) const char* pvk_cpu_capability() {
  return pvk::kNames[static_cast<int>(pvk::cpu_capability())];
}

extern "C" __attribute__((visibility("default"))) const char* pvk_cpu_best_capability() {
  return pvk::kNames[static_cast<int>(pvk::best())];
}

extern "C" __attribute__((visibility("default"))) int pvk_cpu_has_bfloat16_dot() {
  return pvk::cpu_has_bfloat16_dot();
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

// level: 0 off, 1 as the CPU has it, 2 the model. Returns 0, or 2 where this CPU lacks the dot products, whose layout
// of weights it shares.
extern "C" __attribute__((visibility("default"))) int pvk_set_cpu_amx(int level) {
  if (level == pvk::kAmxModel && !pvk::best_has_bfloat16_dot()) return 2;
  pvk::amx_level.store(level, std::memory_order_relaxed);
  return 0;
}

// What is in force: 0 none, 1 the CPU's tiles, 2 the model.
extern "C" __attribute__((visibility("default"))) int pvk_cpu_amx() {
  return static_cast<int>(pvk::cpu_amx());
}
