// The forward kernel of attention, of bfloat16.
#include "ops/attention/forward.cuh"

namespace pvk::attention {

template <>
void Kernels<__nv_bfloat16>::forward(const AttentionParams& p, Stream stream) {
  dispatch_features<__nv_bfloat16>(
      p, [&]<int FEATURES, int EXTRAS>() { run_forward<__nv_bfloat16, FEATURES, EXTRAS>(p, stream); });
}

}  // namespace pvk::attention
