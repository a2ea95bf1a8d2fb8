// Average pooling on the CPU: which kernel serves which layout.
#include "core/isa.h"
#include "ops/avg_pool2d/cpu_kernels.h"

namespace pvk::avg_pool2d {
namespace PVK_ISA {
namespace {

// Registers along channels are at least half full.
bool runs_along_channels(const AvgPool2dParams& p) {
  return p.channels_last && p.C * (p.dtype == DType::kFloat64 ? 2 : 1) * 2 >= kLanes<float>;
}

}  // namespace

void forward(const AvgPool2dParams& p) {
  if (runs_along_channels(p)) return forward_channels(p);
  forward_rows(p);
}

void backward(const AvgPool2dParams& p) {
  if (runs_along_channels(p)) return backward_channels(p);
  backward_rows(p);
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, AvgPool2dParams)
PVK_CPU_ENTRY(void, backward, AvgPool2dParams)

}  // namespace pvk::avg_pool2d
