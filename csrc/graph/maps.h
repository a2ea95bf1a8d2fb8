// What a graph does to maps between convolutions: parameters and the CPU's kernels.
//
// Maps are dense and channels_last, [N, H, W, C] in memory, but for the target of kFlatten.
#pragma once

#include "core/activation.h"
#include "core/types.h"

namespace pvk::graph {

// Values are those of pyvision_kernels/convert/program.py.
enum class MapOp : int32_t {
  kMean,          // over the pixels: [N, 1, 1, C]
  kMaxPool,       // NaN wins, padding loses
  kScale,         // by `other`, [N, 1, 1, C]
  kAffine,        // times scale, plus shift, both [C]; then the activation
  kActivate,      // the activation alone
  kHardsigmoid,   // min(max(x + 3, 0), 6) / 6
  kChannels,      // into some of the channels of the output
  kFlatten,       // [N, C, H, W] contiguous
  kChannelsLast,  // of any strides, to dense channels_last
};

struct MapParams {
  MapOp op;
  DType dtype;        // of input, other and output
  DType scale_dtype;  // float64 beside float64, else float32
  Activation activation;
  const void* input;
  const void* other;  // see kScale
  const void* scale;
  const void* shift;
  void* output;
  int64_t N, C, H, W;  // of the input
  int64_t OH, OW;      // of kMaxPool's output
  int64_t kernel[2], stride[2], padding[2];
  int64_t input_stride[4];  // of kChannelsLast's input
  int64_t output_pitch;     // of kChannels: elements from pixel to pixel
};

void run_map(const MapParams& params, Stream stream);

}  // namespace pvk::graph
