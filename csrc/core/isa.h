// CPU kernels are compiled once for each instruction set, side by side, and picked at run time.
//
// A kernel file lives in `namespace PVK_ISA` (baseline, avx2 or avx512; the build defines it) and ends with
// PVK_CPU_ENTRY, which the baseline copy expands to the dispatcher. Whatever inline code a kernel file uses is in that
// namespace too, or always inlined: a std:: template compiled for AVX-512 would be merged by the linker with the
// baseline's.
#pragma once

namespace pvk {

enum class CpuCapability { kBaseline, kAvx2, kAvx512 };

// The capability in force: PVK_CPU_CAPABILITY (baseline, avx2, avx512), else the best that this CPU has.
CpuCapability cpu_capability();

// Whether it also has the bfloat16 dot products of AVX512-BF16, and pvk_set_cpu_bfloat16_dot() has not turned them off.
// Weights that were packed before are of the other layout.
bool cpu_has_bfloat16_dot();

// Whether bfloat16 products beside those go to AMX's tile registers, or to the model of them (core/amx.h), which only
// tests ask for. PVK_CPU_AMX=0 and pvk_set_cpu_amx() turn it off. The first call asks Linux for the tiles.
enum class CpuAmx { kNone, kTiles, kModel };
CpuAmx cpu_amx();

}  // namespace pvk

#if defined(PVK_ISA_BASELINE) && defined(__x86_64__)
#define PVK_CPU_ENTRY(Result, function, Params)   \
  namespace avx2 {                                \
  Result function(const Params&);                 \
  }                                               \
  namespace avx512 {                              \
  Result function(const Params&);                 \
  }                                               \
  Result function(const Params& params, Stream) { \
    switch (cpu_capability()) {                   \
      case CpuCapability::kAvx512:                \
        return avx512::function(params);          \
      case CpuCapability::kAvx2:                  \
        return avx2::function(params);            \
      case CpuCapability::kBaseline:              \
        break;                                    \
    }                                             \
    return baseline::function(params);            \
  }
#elif defined(PVK_ISA_BASELINE)
#define PVK_CPU_ENTRY(Result, function, Params)   \
  Result function(const Params& params, Stream) { \
    return baseline::function(params);            \
  }
#else
#define PVK_CPU_ENTRY(Result, function, Params)
#endif
