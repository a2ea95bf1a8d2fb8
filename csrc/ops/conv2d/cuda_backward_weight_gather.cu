// The gradient of conv2d with respect to its weight where channels are not vectors: of contiguous maps, of first
// layers, of odd numbers of channels.
#include "core/dispatch.cuh"
#include "ops/conv2d/backward_weight.cuh"

namespace pvk::conv2d {
namespace {

template <typename scalar_t, bool TENSOR_CORES>
void run_gathered(const BackwardWeightParams& p, const WeightPlan& plan, Stream stream) {
  return plan.vector_output ? launch_backward_weight<scalar_t, TENSOR_CORES, false, false, true>(p, plan, stream)
                            : launch_backward_weight<scalar_t, TENSOR_CORES, false, true, true>(p, plan, stream);
}

}  // namespace

void backward_weight_gathered(const BackwardWeightParams& p, const WeightPlan& plan, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      if (plan.tensor_cores) return run_gathered<scalar_t, true>(p, plan, stream);
    }
    if constexpr (sizeof(scalar_t) >= 4) run_gathered<scalar_t, false>(p, plan, stream);
  });
}

}  // namespace pvk::conv2d
