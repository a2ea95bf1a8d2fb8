// The backward kernels of attention, of bfloat16.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<__nv_bfloat16>::backward(const BackwardCall& call, Stream stream) {
  dispatch_features<__nv_bfloat16>(call.params.forward,
                                   [&]<int FEATURES>() { run_backward_rows<__nv_bfloat16, FEATURES>(call, stream); });
}

}  // namespace pvk::attention
