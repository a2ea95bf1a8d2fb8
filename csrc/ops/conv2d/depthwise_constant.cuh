// The choice among the kernels of depthwise convolution that have taps and strides as constants.
#pragma once

#include "ops/conv2d/depthwise_channels.cuh"
#include "ops/conv2d/depthwise_planes.cuh"

namespace pvk::conv2d {
namespace {

// False where no such kernel suits; taps: of constant_taps(). float64 has none.
template <typename scalar_t, int STEP, int SPREAD>
bool run_constant(const DepthwiseParams& p, int taps, Stream stream) {
  if constexpr (!std::is_same_v<scalar_t, double>) {
    constexpr int kVec = kVec16<scalar_t>;
    const bool vectors = suits_channels<scalar_t, kVec>(p), pairs = suits_channels<scalar_t, kPair>(p);
    if (taps == 0 || !(vectors || pairs || suits_planes(p))) return false;
    dispatch_taps(taps, [&]<int K>() {
      if (vectors) return run_channels<scalar_t, kVec, K, STEP, SPREAD>(p, stream);
      if (pairs) return run_channels<scalar_t, kPair, K, STEP, SPREAD>(p, stream);
      run_planes<scalar_t, K, STEP, SPREAD>(p, stream);
    });
    return true;
  }
  return false;
}

}  // namespace
}  // namespace pvk::conv2d
