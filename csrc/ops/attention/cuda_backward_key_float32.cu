// The gradients of attention's key and value, of float32.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<float>::backward_key(const BackwardCall& call, Stream stream) {
  dispatch_features<float>(call.params.forward, [&]<int FEATURES, int EXTRAS>() {
    run_backward_key<float, FEATURES, EXTRAS>(call, stream);
  });
}

}  // namespace pvk::attention
