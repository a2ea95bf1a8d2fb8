// The gradient of attention's query, of float16.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<__half>::backward_query(const BackwardCall& call, Stream stream) {
  dispatch_features<__half>(call.params.forward, [&]<int FEATURES, int EXTRAS>() {
    run_backward_query<__half, FEATURES, EXTRAS>(call, stream);
  });
}

}  // namespace pvk::attention
