// The forward kernel of attention, of float16.
#include "ops/attention/cuda_kernels.h"
#include "ops/attention/forward.cuh"

namespace pvk::attention {

template <>
void Kernels<__half>::forward(const AttentionParams& p, Stream stream) {
  dispatch_features<__half>(p, [&]<int FEATURES>() { run_forward<__half, FEATURES>(p, stream); });
}

}  // namespace pvk::attention
