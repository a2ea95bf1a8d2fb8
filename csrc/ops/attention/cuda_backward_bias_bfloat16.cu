// The gradient of attention's bias, of bfloat16.
#include "ops/attention/backward_bias.cuh"

namespace pvk::attention {

template <>
int64_t Kernels<__nv_bfloat16>::bias_parts(const AttentionBackwardParams& p) {
  return dispatch_biased(p.forward,
                         [&]<int FEATURES, int EXTRAS>() { return parts_of_sum<__nv_bfloat16, FEATURES, EXTRAS>(p); });
}

template <>
void Kernels<__nv_bfloat16>::backward_bias(const BackwardCall& call, Stream stream) {
  dispatch_biased(call.params.forward, [&]<int FEATURES, int EXTRAS>() {
    run_backward_bias<__nv_bfloat16, FEATURES, EXTRAS>(call, stream);
  });
}

}  // namespace pvk::attention
