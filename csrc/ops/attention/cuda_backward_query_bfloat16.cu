// The gradient of attention's query, of bfloat16.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<__nv_bfloat16>::backward_query(const BackwardCall& call, Stream stream) {
  dispatch_features<__nv_bfloat16>(call.params.forward, [&]<int FEATURES, int EXTRAS>() {
    run_backward_query<__nv_bfloat16, FEATURES, EXTRAS>(call, stream);
  });
}

}  // namespace pvk::attention
