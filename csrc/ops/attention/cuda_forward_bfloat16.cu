// The forward kernel of attention, of bfloat16.
#include "ops/attention/cuda_kernels.h"
#include "ops/attention/forward.cuh"

namespace pvk::attention {

template <>
void Kernels<__nv_bfloat16>::forward(const AttentionParams& p, Stream stream) {
  dispatch_features<__nv_bfloat16>(p, [&]<int FEATURES>() { run_forward<__nv_bfloat16, FEATURES>(p, stream); });
}

}  // namespace pvk::attention
