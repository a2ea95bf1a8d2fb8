// conv2d on the CPU, winograd: to be written.
#include "ops/conv2d/cpu_kernels.h"

namespace pvk::conv2d::PVK_ISA {

void forward_winograd(const Conv2dParams& p) {
  forward_direct(p);
}

int64_t packed_bytes_winograd(const Conv2dParams&) {
  return 0;
}

void pack_winograd(const PackParams&) {}

}  // namespace pvk::conv2d::PVK_ISA
