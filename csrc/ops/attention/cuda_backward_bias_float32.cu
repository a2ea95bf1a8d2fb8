// The gradient of attention's bias, of float32.
#include "ops/attention/backward_bias.cuh"

namespace pvk::attention {

template <>
int64_t Kernels<float>::bias_parts(const AttentionBackwardParams& p) {
  return dispatch_features<float>(p.forward, [&]<int FEATURES>() { return parts_of_sum<float, FEATURES>(p); });
}

template <>
void Kernels<float>::backward_bias(const BackwardCall& call, Stream stream) {
  dispatch_features<float>(call.params.forward,
                           [&]<int FEATURES>() { run_backward_bias<float, FEATURES>(call, stream); });
}

}  // namespace pvk::attention
