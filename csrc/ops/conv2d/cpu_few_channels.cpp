#include "ops/conv2d/cpu_kernels.h"
namespace pvk::conv2d::PVK_ISA {
void forward_few_channels(const Conv2dParams&) {}
int64_t packed_bytes_few_channels(const Conv2dParams&) { return 0; }
void pack_few_channels(const PackParams&) {}
}
