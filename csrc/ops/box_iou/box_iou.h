// Pairwise overlap of boxes: parameters and backend interface. output[b, i, j] is the overlap of boxes1[b, i] and
// boxes2[b, j], of one of four kinds.
//
// B batches, N and M boxes. Boxes of 16 bits are computed as float; the output is float, or double for double.
// Source: Rezatofighi et al., "Generalized IoU", 2019; Zheng et al., "Distance-IoU Loss", 2020.
#pragma once

#include "core/types.h"
#include "ops/box_iou/pair.h"

namespace pvk::box_iou {

// Strides count elements.
struct BoxIouParams {
  const void* boxes1;  // [B, N, 4]
  const void* boxes2;  // [B, M, 4]
  void* output;        // forward: [B, N, M], contiguous, every element written
  const void* grad;    // backward: [B, N, M], of the output's dtype, through any strides
  void* grad1;         // backward: [B, N, 4], contiguous, every element written; nullptr where nobody asks
  void* grad2;         // backward: [B, M, 4], likewise
  void* scratch;       // scratch_bytes(params) bytes on the device
  DType dtype;         // of the boxes and their gradients
  Kind kind;
  Format format;
  int64_t B, N, M;
  int64_t boxes1_stride[3];
  int64_t boxes2_stride[3];
  int64_t grad_stride[3];
  double eps;
};

// Backend interface. `scratch_bytes` is asked with the sizes, the kind, the dtype, grad1 and grad2 set.
void forward(const BoxIouParams& params, Stream stream);
int64_t scratch_bytes(const BoxIouParams& params);  // of backward
void backward(const BoxIouParams& params, Stream stream);

}  // namespace pvk::box_iou
