// The forward kernel of attention, of float16.
#include "ops/attention/forward.cuh"

namespace pvk::attention {

template <>
void Kernels<__half>::forward(const AttentionParams& p, Stream stream) {
  dispatch_features<__half>(p, [&]<int FEATURES, int EXTRAS>() { run_forward<__half, FEATURES, EXTRAS>(p, stream); });
}

}  // namespace pvk::attention
