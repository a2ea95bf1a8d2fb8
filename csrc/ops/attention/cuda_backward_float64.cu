// The backward kernels of attention, of float64.
#include "ops/attention/backward.cuh"

namespace pvk::attention {

template <>
void Kernels<double>::backward(const BackwardCall& call, Stream stream) {
  dispatch_features<double>(call.params.forward,
                            [&]<int FEATURES>() { run_backward_rows<double, FEATURES>(call, stream); });
}

}  // namespace pvk::attention
