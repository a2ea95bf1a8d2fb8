// Non-maximum suppression: parameters and backend interface.
//
// N boxes in descending order of score; box j is dropped when an earlier kept box i has IoU(i, j) > iou_threshold.
// The IoU is torchvision's CPU arithmetic, rounding for rounding: areas, intersection and quotient in T (float for
// half types), no contraction into fused multiply-adds, the comparison in double.
#pragma once

#include "core/math.h"
#include "core/types.h"

namespace pvk::nms {

struct NmsParams {
  const void* boxes;     // [N, 4]: (x1, y1, x2, y2), through any strides
  const int64_t* order;  // [N]: box indices by descending score, ties by index
  int64_t* keep;         // [N]: written with the indices kept, in that order
  void* scratch;         // scratch_bytes(N, dtype) bytes on the device; nullptr where that is 0
  DType dtype;
  int64_t N;
  int64_t boxes_stride[2];
  double iou_threshold;
};

// Backend interface. `forward` returns how many indices were kept; on a GPU that is its one synchronisation.
int64_t scratch_bytes(int64_t N, DType dtype);
int64_t forward(const NmsParams& params, Stream stream);

}  // namespace pvk::nms
