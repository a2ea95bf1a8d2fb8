// linear as the 1 x 1 convolution of one image, whose pixels are the rows.
#pragma once

#include "core/math.h"
#include "ops/conv2d/conv2d.h"
#include "ops/linear/linear.h"

namespace pvk::linear {

PVK_HOST_DEVICE void set_row_strides(int64_t (&stride)[4], int64_t row, int64_t channel, int64_t rows) {
  stride[0] = stride[2] = rows * row;
  stride[1] = channel;
  stride[3] = row;
}

// Params: Conv2dParams, or those of packing, whose target is not set.
template <typename Params>
PVK_HOST_DEVICE Params as_convolution(const LinearParams& p) {
  Params conv{};
  conv.input = p.input;
  conv.weight = p.weight;
  conv.packed = p.packed;
  conv.bias = p.bias;
  conv.residual = p.residual;
  conv.output = p.output;
  conv.dtype = conv.scale_dtype = p.dtype;
  conv.bias_dtype = p.bias_dtype;
  conv.activation = p.activation;
  conv.N = conv.H = conv.OH = conv.R = conv.S = conv.groups = 1;
  conv.C = p.C;
  conv.W = conv.OW = p.M;
  conv.K = p.K;
  for (int i = 0; i < 2; ++i) conv.stride[i] = conv.dilation[i] = 1;
  set_row_strides(conv.input_stride, p.input_stride[0], p.input_stride[1], p.M);
  set_row_strides(conv.residual_stride, p.residual_stride[0], p.residual_stride[1], p.M);
  set_row_strides(conv.output_stride, p.K, 1, p.M);
  conv.weight_stride[0] = p.weight_stride[0];
  conv.weight_stride[1] = p.weight_stride[1];
  return conv;
}

}  // namespace pvk::linear
