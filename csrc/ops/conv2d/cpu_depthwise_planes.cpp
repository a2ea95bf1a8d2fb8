#include "ops/conv2d/depthwise.h"
namespace pvk::conv2d::PVK_ISA {
template <typename scalar_t>
void depthwise_planes(const Conv2dParams&, const opmath_t<scalar_t>*) {}
template void depthwise_planes<float>(const Conv2dParams&, const float*);
template void depthwise_planes<double>(const Conv2dParams&, const double*);
template void depthwise_planes<Float16>(const Conv2dParams&, const float*);
template void depthwise_planes<BFloat16>(const Conv2dParams&, const float*);
}
