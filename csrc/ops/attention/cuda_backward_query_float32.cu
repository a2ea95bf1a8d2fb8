// The gradient of attention's query, of float32.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<float>::backward_query(const BackwardCall& call, Stream stream) {
  dispatch_features<float>(call.params.forward, [&]<int FEATURES, int EXTRAS>() {
    run_backward_query<float, FEATURES, EXTRAS>(call, stream);
  });
}

}  // namespace pvk::attention
