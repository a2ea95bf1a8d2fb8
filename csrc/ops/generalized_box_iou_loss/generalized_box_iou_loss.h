// Losses of box regression, generalized, distance and complete: parameters and backend interface. loss[i] compares
// boxes1[i] with boxes2[i].
//
// N pairs of boxes. Boxes of 16 bits are computed as float; the loss is float, or double for double.
// Source: Rezatofighi et al., "Generalized IoU", 2019; Zheng et al., "Distance-IoU Loss", 2020.
#pragma once

#include "core/types.h"
#include "ops/box_iou/pair.h"

namespace pvk::generalized_box_iou_loss {

enum class Reduction : int64_t { kNone, kMean, kSum };

// Strides count elements.
struct LossParams {
  const void* boxes1;  // [N, 4]: (x1, y1, x2, y2)
  const void* boxes2;  // [N, 4]
  void* loss;          // forward: [N], contiguous, or one number; every element written
  const void* grad;    // backward: the loss's gradient, its dtype; element i at i * grad_stride
  void* grad1;         // backward: [N, 4], contiguous, every element written; nullptr where nobody asks
  void* grad2;         // backward: likewise
  void* scratch;       // forward: scratch_bytes(params) bytes on the device
  DType dtype;         // of the boxes and their gradients
  box_iou::Kind kind;  // not kPlain
  Reduction reduction;
  int64_t N;
  int64_t boxes1_stride[2];
  int64_t boxes2_stride[2];
  int64_t grad_stride;  // 0 where the loss is one number
  double union_eps, enclosing_eps, alpha_eps;
};

// Backend interface.
int64_t scratch_bytes(const LossParams& params);  // of forward
void forward(const LossParams& params, Stream stream);
void backward(const LossParams& params, Stream stream);

}  // namespace pvk::generalized_box_iou_loss
