// The CUDA kernels of conv2d that have files of their own, and when they serve.
#pragma once

#include "ops/conv2d/conv2d.h"

namespace pvk::conv2d {

// ---- depthwise: one input channel a group, any multiple of outputs ----

PVK_HOST_DEVICE bool is_depthwise(const Conv2dParams& p) {
  return p.groups > 1 && p.groups == p.C;
}

// Neither wants a workspace.
void forward_depthwise(const Conv2dParams& params, Stream stream);
void backward_input_depthwise(const BackwardInputParams& params, Stream stream);

void backward_weight_depthwise(const BackwardWeightParams& params, Stream stream);
int64_t depthwise_workspace_bytes(const BackwardWeightParams& params);

}  // namespace pvk::conv2d
