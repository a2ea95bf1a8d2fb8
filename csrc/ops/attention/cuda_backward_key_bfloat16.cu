// The gradients of attention's key and value, of bfloat16.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<__nv_bfloat16>::backward_key(const BackwardCall& call, Stream stream) {
  dispatch_features<__nv_bfloat16>(call.params.forward, [&]<int FEATURES, int EXTRAS>() {
    run_backward_key<__nv_bfloat16, FEATURES, EXTRAS>(call, stream);
  });
}

}  // namespace pvk::attention
