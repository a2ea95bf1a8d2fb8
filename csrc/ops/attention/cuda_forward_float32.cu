// The forward kernel of attention, of float32.
#include "ops/attention/forward.cuh"

namespace pvk::attention {

template <>
void Kernels<float>::forward(const AttentionParams& p, Stream stream) {
  dispatch_features<float>(p, [&]<int FEATURES, int EXTRAS>() { run_forward<float, FEATURES, EXTRAS>(p, stream); });
}

}  // namespace pvk::attention
