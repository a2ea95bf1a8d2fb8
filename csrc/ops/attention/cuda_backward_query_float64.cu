// The gradient of attention's query, of float64.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<double>::backward_query(const BackwardCall& call, Stream stream) {
  dispatch_features<double>(call.params.forward, [&]<int FEATURES, int EXTRAS>() {
    run_backward_query<double, FEATURES, EXTRAS>(call, stream);
  });
}

}  // namespace pvk::attention
