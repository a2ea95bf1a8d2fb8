// The forward kernel of attention, of float32.
#include "ops/attention/cuda_kernels.h"
#include "ops/attention/forward.cuh"

namespace pvk::attention {

template <>
void Kernels<float>::forward(const AttentionParams& p, Stream stream) {
  dispatch_features<float>(p, [&]<int FEATURES>() { run_forward<float, FEATURES>(p, stream); });
}

}  // namespace pvk::attention
