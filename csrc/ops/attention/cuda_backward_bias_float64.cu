// The gradient of attention's bias, of float64.
#include "ops/attention/backward_bias.cuh"

namespace pvk::attention {

template <>
int64_t Kernels<double>::bias_parts(const AttentionBackwardParams& p) {
  return dispatch_biased(p.forward,
                         [&]<int FEATURES, int EXTRAS>() { return parts_of_sum<double, FEATURES, EXTRAS>(p); });
}

template <>
void Kernels<double>::backward_bias(const BackwardCall& call, Stream stream) {
  dispatch_biased(call.params.forward,
                  [&]<int FEATURES, int EXTRAS>() { run_backward_bias<double, FEATURES, EXTRAS>(call, stream); });
}

}  // namespace pvk::attention
