// The gradient of conv2d with respect to its input, on CUDA: one thread an element. Correct and plain.
#include "core/activation.cuh"
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/warp.cuh"
#include "ops/conv2d/cuda_kernels.h"

namespace pvk::conv2d {
namespace {

constexpr int kBlockThreads = 256;

// Thread i owns element i of [N, C, H, W]: it sums over the taps through which a pixel of the result read it.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads) conv2d_backward_input_kernel(const BackwardInputParams p) {
  using T = opmath_t<scalar_t>;
  const int64_t count = p.N * p.C * p.H * p.W, channels = p.C / p.groups, outputs = p.K / p.groups;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t w = i % p.W, h = i / p.W % p.H, c = i / (p.W * p.H) % p.C, n = i / (p.W * p.H * p.C);
    const int64_t first = c / channels * outputs;
    T sum = T(0);
    for (int64_t r = 0; r < p.R; ++r) {
      const int64_t y = h + p.padding_top - r * p.dilation[0], oh = y / p.stride[0];
      if (y < 0 || oh >= p.OH || oh * p.stride[0] != y) continue;
      for (int64_t s = 0; s < p.S; ++s) {
        const int64_t x = w + p.padding_left - s * p.dilation[1], ow = x / p.stride[1];
        if (x < 0 || ow >= p.OW || ow * p.stride[1] != x) continue;
        const scalar_t* g = static_cast<const scalar_t*>(p.grad_output) + n * p.grad_output_stride[0] +
                            first * p.grad_output_stride[1] + oh * p.grad_output_stride[2] +
                            ow * p.grad_output_stride[3];
        const scalar_t* f = static_cast<const scalar_t*>(p.weight) + first * p.weight_stride[0] +
                            c % channels * p.weight_stride[1] + r * p.weight_stride[2] + s * p.weight_stride[3];
        for (int64_t k = 0; k < outputs; ++k)
          sum = fma(to_opmath(g[k * p.grad_output_stride[1]]), to_opmath(f[k * p.weight_stride[0]]), sum);
      }
    }
    if (p.bias != nullptr) {
      sum += p.bias_dtype == p.dtype ? to_opmath(static_cast<const scalar_t*>(p.bias)[c])
                                     : T(static_cast<const float*>(p.bias)[c]);
    }
    const int64_t at = n * p.grad_input_stride[0] + c * p.grad_input_stride[1] + h * p.grad_input_stride[2] +
                       w * p.grad_input_stride[3];
    static_cast<scalar_t*>(p.grad_input)[at] = from_opmath<scalar_t>(activate(p.activation, sum));
  }
}

}  // namespace

void backward_input(const BackwardInputParams& p, Stream stream) {
  if (is_depthwise(p)) return backward_input_depthwise(p, stream);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const int64_t blocks = min_of(ceil_div(p.N * p.C * p.H * p.W, int64_t(kBlockThreads)), int64_t(1) << 20);
    launch(conv2d_backward_input_kernel<scalar_t>, {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream}, p);
  });
}

int64_t workspace_bytes(const BackwardInputParams&) {
  return 0;
}

}  // namespace pvk::conv2d
