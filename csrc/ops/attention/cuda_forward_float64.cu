// The forward kernel of attention, of float64.
#include "ops/attention/forward.cuh"

namespace pvk::attention {

template <>
void Kernels<double>::forward(const AttentionParams& p, Stream stream) {
  dispatch_features<double>(p, [&]<int FEATURES, int EXTRAS>() { run_forward<double, FEATURES, EXTRAS>(p, stream); });
}

}  // namespace pvk::attention
