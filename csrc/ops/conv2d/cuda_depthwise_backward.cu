// The gradient of a depthwise convolution with respect to its input, on CUDA: a forward with flipped taps.
#include "core/dispatch.cuh"
#include "ops/conv2d/depthwise_constant.cuh"

namespace pvk::conv2d {
namespace {

template <typename scalar_t>
DepthwiseParams as_forward(const BackwardInputParams& q) {
  DepthwiseParams p{};
  p.input = q.grad_output;
  p.output = q.grad_input;
  p.bias = q.bias;
  p.dtype = q.dtype;
  p.bias_dtype = q.bias_dtype;
  p.activation = q.activation;
  p.N = q.N;
  p.C = q.K;
  p.H = q.OH;
  p.W = q.OW;
  p.K = q.C;
  p.R = q.R;
  p.S = q.S;
  p.OH = q.H;
  p.OW = q.W;
  p.groups = q.groups;
  for (int i = 0; i < 2; ++i) {
    p.stride[i] = 1;
    p.spread[i] = q.stride[i];
    p.dilation[i] = q.dilation[i];
  }
  p.padding_top = q.dilation[0] * (q.R - 1) - q.padding_top;
  p.padding_left = q.dilation[1] * (q.S - 1) - q.padding_left;
  for (int i = 0; i < 4; ++i) {
    p.input_stride[i] = q.grad_output_stride[i];
    p.output_stride[i] = q.grad_input_stride[i];
  }
  // [C, K / C, R, S], of [K, 1, R, S], from the last tap on
  p.weight = static_cast<const scalar_t*>(q.weight) + (q.R - 1) * q.weight_stride[2] + (q.S - 1) * q.weight_stride[3];
  p.weight_stride[0] = q.K / q.C * q.weight_stride[0];
  p.weight_stride[1] = q.weight_stride[0];
  p.weight_stride[2] = -q.weight_stride[2];
  p.weight_stride[3] = -q.weight_stride[3];
  return p;
}

}  // namespace

void backward_input_depthwise(const BackwardInputParams& q, Stream stream) {
  dispatch_dtype(q.dtype, [&]<typename scalar_t>() {
    const DepthwiseParams p = as_forward<scalar_t>(q);
    const int taps = p.spread[0] == 2 && p.spread[1] == 2 ? constant_taps(p) : 0;
    if (run_constant<scalar_t, 1, 2>(p, taps, stream)) return;
    gather_depthwise(p, stream);
  });
}

}  // namespace pvk::conv2d
