// The gradients of attention's key and value, of float64.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<double>::backward_key(const BackwardCall& call, Stream stream) {
  dispatch_features<double>(call.params.forward, [&]<int FEATURES, int EXTRAS>() {
    run_backward_key<double, FEATURES, EXTRAS>(call, stream);
  });
}

}  // namespace pvk::attention
