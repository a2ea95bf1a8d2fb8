// The forward kernel of attention, of bfloat16.
#include "ops/attention/cuda_kernels.h"
#include "ops/attention/forward.cuh"

namespace pvk::attention {

void forward_bfloat16(const AttentionParams& p, Stream stream) {
  dispatch_half(p, [&]<int FEATURES>() { run_forward<__nv_bfloat16, FEATURES>(p, stream); });
}

}  // namespace pvk::attention
