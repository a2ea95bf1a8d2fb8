// conv2d on the CPU, depthwise: to be written.
#include "ops/conv2d/cpu_kernels.h"

namespace pvk::conv2d::PVK_ISA {

void forward_depthwise(const Conv2dParams& p) {
  forward_direct(p);
}

int64_t packed_bytes_depthwise(const Conv2dParams&) {
  return 0;
}

void pack_depthwise(const PackParams&) {}

}  // namespace pvk::conv2d::PVK_ISA
