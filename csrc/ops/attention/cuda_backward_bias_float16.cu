// The gradient of attention's bias, of float16.
#include "ops/attention/backward_bias.cuh"

namespace pvk::attention {

template <>
int64_t Kernels<__half>::bias_parts(const AttentionBackwardParams& p) {
  return dispatch_biased(p.forward,
                         [&]<int FEATURES, int EXTRAS>() { return parts_of_sum<__half, FEATURES, EXTRAS>(p); });
}

template <>
void Kernels<__half>::backward_bias(const BackwardCall& call, Stream stream) {
  dispatch_biased(call.params.forward,
                  [&]<int FEATURES, int EXTRAS>() { run_backward_bias<__half, FEATURES, EXTRAS>(call, stream); });
}

}  // namespace pvk::attention
