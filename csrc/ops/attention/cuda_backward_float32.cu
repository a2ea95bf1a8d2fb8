// The backward kernels of attention, of float32.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<float>::backward(const BackwardCall& call, Stream stream) {
  dispatch_features<float>(call.params.forward,
                           [&]<int FEATURES>() { run_backward_rows<float, FEATURES>(call, stream); });
}

}  // namespace pvk::attention
