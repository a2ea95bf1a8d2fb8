// The backward kernels of attention, of float16.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<__half>::backward(const BackwardCall& call, Stream stream) {
  dispatch_features<__half>(call.params.forward,
                            [&]<int FEATURES>() { run_backward_rows<__half, FEATURES>(call, stream); });
}

}  // namespace pvk::attention
