// Average pooling: parameters and backend interface.
//
// N images, C channels; H x W the map, OH x OW what it is pooled to. Source: PyTorch's avg_pool2d.
#pragma once

#include "core/pool_window.h"
#include "core/types.h"

namespace pvk::avg_pool2d {

// Strides count elements. Maps are planes or channels_last: kernels may rely on column (channel) stride 1, and on a
// pixel stride of C in channels_last. What is written is dense.
struct AvgPool2dParams {
  void* map;     // [N, C, H, W]. Forward: read. Backward: its gradient, every element written.
  void* pooled;  // [N, C, OH, OW]. Forward: every element written. Backward: its gradient, read.
  DType dtype;
  int64_t N, C;
  PoolAxis rows, columns;
  bool count_padding;  // a window's pixels are divided by those in the padding too
  int64_t divisor;     // or by this, where it is not 0
  int64_t map_stride[4];
  int64_t pooled_stride[4];
  bool channels_last;

  // Window (oh, ow) is divided by divisor_of(rows, oh) * divisor_of(columns, ow).
  PVK_HOST_DEVICE double divisor_of(const PoolAxis& axis, bool is_rows, int64_t o) const {
    if (divisor != 0) return is_rows ? double(divisor) : 1.0;
    const PoolRange window = axis.window(o);
    return double(max_of(count_padding ? axis.padded_count(o) : window.end - window.begin, int64_t(1)));
  }
};

void forward(const AvgPool2dParams& params, Stream stream);
void backward(const AvgPool2dParams& params, Stream stream);

}  // namespace pvk::avg_pool2d
