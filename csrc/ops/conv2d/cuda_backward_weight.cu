// The gradient of conv2d with respect to its weight, on CUDA: one thread an element. Correct and plain.
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/warp.cuh"
#include "ops/conv2d/cuda_kernels.h"

namespace pvk::conv2d {
namespace {

constexpr int kBlockThreads = 256;

// Thread i owns element i of [K, C / groups, R, S]: it sums over the pixels of all images, in their order.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads) conv2d_backward_weight_kernel(const BackwardWeightParams p) {
  using T = opmath_t<scalar_t>;
  const int64_t channels = p.C / p.groups, count = p.K * channels * p.R * p.S;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t s = i % p.S, r = i / p.S % p.R, c = i / (p.S * p.R) % channels, k = i / (p.S * p.R * channels);
    const int64_t input_channel = k / (p.K / p.groups) * channels + c;
    T sum = T(0);
    for (int64_t n = 0; n < p.N; ++n) {
      for (int64_t oh = 0; oh < p.OH; ++oh) {
        const int64_t h = oh * p.stride[0] - p.padding_top + r * p.dilation[0];
        if (h < 0 || h >= p.H) continue;
        const scalar_t* x = static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] +
                            input_channel * p.input_stride[1] + h * p.input_stride[2];
        const scalar_t* g = static_cast<const scalar_t*>(p.grad_output) + n * p.grad_output_stride[0] +
                            k * p.grad_output_stride[1] + oh * p.grad_output_stride[2];
        for (int64_t ow = 0; ow < p.OW; ++ow) {
          const int64_t w = ow * p.stride[1] - p.padding_left + s * p.dilation[1];
          if (w < 0 || w >= p.W) continue;
          sum = fma(to_opmath(x[w * p.input_stride[3]]), to_opmath(g[ow * p.grad_output_stride[3]]), sum);
        }
      }
    }
    const int64_t at = k * p.grad_weight_stride[0] + c * p.grad_weight_stride[1] + r * p.grad_weight_stride[2] +
                       s * p.grad_weight_stride[3];
    static_cast<scalar_t*>(p.grad_weight)[at] = from_opmath<scalar_t>(sum);
  }
}

}  // namespace

void backward_weight(const BackwardWeightParams& p, Stream stream) {
  if (is_depthwise(p)) return backward_weight_depthwise(p, stream);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const int64_t count = p.K * (p.C / p.groups) * p.R * p.S;
    const int64_t blocks = min_of(ceil_div(count, int64_t(kBlockThreads)), int64_t(1) << 20);
    launch(conv2d_backward_weight_kernel<scalar_t>, {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream}, p);
  });
}

int64_t workspace_bytes(const BackwardWeightParams& p) {
  if (is_depthwise(p)) return depthwise_workspace_bytes(p);
  return 0;
}

}  // namespace pvk::conv2d
