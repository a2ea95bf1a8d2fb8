// The gradient of attention's bias, of float16.
#include "ops/attention/backward_bias.cuh"

namespace pvk::attention {

template <>
int64_t Kernels<__half>::bias_parts(const AttentionBackwardParams& p) {
  return dispatch_features<__half>(p.forward, [&]<int FEATURES>() { return parts_of_sum<__half, FEATURES>(p); });
}

template <>
void Kernels<__half>::backward_bias(const BackwardCall& call, Stream stream) {
  dispatch_features<__half>(call.params.forward,
                            [&]<int FEATURES>() { run_backward_bias<__half, FEATURES>(call, stream); });
}

}  // namespace pvk::attention
