// The gradient of attention's bias, of float32.
#include "ops/attention/backward_bias.cuh"

namespace pvk::attention {

template <>
int64_t Kernels<float>::bias_parts(const AttentionBackwardParams& p) {
  return dispatch_biased(p.forward,
                         [&]<int FEATURES, int EXTRAS>() { return parts_of_sum<float, FEATURES, EXTRAS>(p); });
}

template <>
void Kernels<float>::backward_bias(const BackwardCall& call, Stream stream) {
  dispatch_biased(call.params.forward,
                  [&]<int FEATURES, int EXTRAS>() { run_backward_bias<float, FEATURES, EXTRAS>(call, stream); });
}

}  // namespace pvk::attention
