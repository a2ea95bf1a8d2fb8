// The forward kernel of attention, of float64.
#include "ops/attention/cuda_kernels.h"
#include "ops/attention/forward.cuh"

namespace pvk::attention {

template <>
void Kernels<double>::forward(const AttentionParams& p, Stream stream) {
  dispatch_features<double>(p, [&]<int FEATURES>() { run_forward<double, FEATURES>(p, stream); });
}

}  // namespace pvk::attention
