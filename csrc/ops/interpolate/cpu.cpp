// Resizing on the CPU: which kernel serves which layout.
#include "core/isa.h"
#include "ops/interpolate/cpu_kernels.h"

namespace pvk::interpolate {
namespace PVK_ISA {

void resize(const InterpolateParams& p) {
  // Registers along channels are at least half full.
  if (p.channels_last && p.C * (p.dtype == DType::kFloat64 ? 2 : 1) * 2 >= kLanes<float>) return resize_channels(p);
  resize_rows(p);
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, resize, InterpolateParams)

#if defined(PVK_ISA_BASELINE)
int64_t scratch_bytes(const InterpolateParams&) {
  return 0;
}
#endif

}  // namespace pvk::interpolate
