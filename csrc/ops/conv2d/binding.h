// conv2d for bindings: the operator's checks, for its own binding and for graphs.
#pragma once

#include "core/layer_binding.h"
#include "ops/conv2d/conv2d.h"

namespace pvk::conv2d {

inline constexpr size_t kGeometryNumbers = 10;

// What a layer holds. prepare() makes what is not contiguous so.
struct Constants {
  Tensor weight;
  OptionalTensor bias, scale, shift, packed;
};

struct Call {
  const int64_t* geometry;  // kGeometryNumbers of them
  int64_t activation;
  bool pool;
  int64_t algorithm;
};

// Checks everything; the parameters without an output, which is [N, K, rows_out(), columns_out()]. They point into the
// arguments.
Conv2dParams prepare(const char* op, const View& input, Constants& constants, const View* residual, const Call& call,
                     Stream stream);

void run(Conv2dParams& params, const View& output, Stream stream);

}  // namespace pvk::conv2d
