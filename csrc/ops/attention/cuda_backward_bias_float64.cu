// The gradient of attention's bias, of float64.
#include "ops/attention/backward_bias.cuh"

namespace pvk::attention {

template <>
int64_t Kernels<double>::bias_parts(const AttentionBackwardParams& p) {
  return dispatch_features<double>(p.forward, [&]<int FEATURES>() { return parts_of_sum<double, FEATURES>(p); });
}

template <>
void Kernels<double>::backward_bias(const BackwardCall& call, Stream stream) {
  dispatch_features<double>(call.params.forward,
                            [&]<int FEATURES>() { run_backward_bias<double, FEATURES>(call, stream); });
}

}  // namespace pvk::attention
