// conv2d on the CPU, few_channels: to be written.
#include "ops/conv2d/cpu_kernels.h"

namespace pvk::conv2d::PVK_ISA {

void forward_few_channels(const Conv2dParams& p) {
  forward_direct(p);
}

int64_t packed_bytes_few_channels(const Conv2dParams&) {
  return 0;
}

void pack_few_channels(const PackParams&) {}

}  // namespace pvk::conv2d::PVK_ISA
