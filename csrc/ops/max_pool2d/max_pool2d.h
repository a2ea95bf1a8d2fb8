// Max pooling and its partial inverse: parameters and backend interface.
//
// N images, C channels; H x W the map, OH x OW what it is pooled to. The places of maxima are y * W + x.
// Source: PyTorch's max_pool2d: of equal values the first counts, row by row; of several NaN the last.
#pragma once

#include "core/pool_window.h"
#include "core/types.h"

namespace pvk::max_pool2d {

// Strides count elements. Maps are planes or channels_last: kernels may rely on column (channel) stride 1, and on a
// pixel stride of C in channels_last. What is written is dense.
struct MaxPool2dParams {
  void* map;        // [N, C, H, W]. Forward: read. Backward: its gradient, every element written.
  void* pooled;     // [N, C, OH, OW]. Forward: every element written. Backward: its gradient, read.
  int32_t* places;  // [N, C, OH, OW], -1 where a window has no pixel. Forward: written, or null. Backward: read.
  DType dtype;
  int64_t N, C;
  PoolAxis rows, columns;
  int64_t map_stride[4];
  int64_t pooled_stride[4];  // of places too
  bool channels_last;
};

void forward(const MaxPool2dParams& params, Stream stream);
void backward(const MaxPool2dParams& params, Stream stream);

// Each element of the input goes to its place in the output, the last of those with the same place; the rest is zeros.
struct MaxUnpool2dParams {
  const void* input;      // [N, C, pixels_in], dense in the layout
  const int64_t* places;  // as input
  void* output;           // [N, C, pixels_out], dense in the layout
  int32_t* owner;         // scratch of owner_elements(), as the output: who is last
  DType dtype;
  int64_t N, C, pixels_in, pixels_out;
  bool channels_last;
};

// Returns the first element whose place is outside of the output, or -1. CUDA leaves such elements out: always -1.
int64_t unpool(const MaxUnpool2dParams& params, Stream stream);
int64_t owner_elements(const MaxUnpool2dParams& params, Stream stream);

}  // namespace pvk::max_pool2d
