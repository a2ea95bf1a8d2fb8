// linear for bindings: the operator's checks, for its own binding and for graphs.
#pragma once

#include "core/layer_binding.h"
#include "ops/linear/linear.h"

namespace pvk::linear {

// What a layer holds. prepare() makes what is not contiguous so.
struct Constants {
  Tensor weight;
  OptionalTensor bias, packed;
};

// Checks everything; the parameters without an output, which is [M, K]. They point into the arguments.
LinearParams prepare(const char* op, const View& input, Constants& constants, const View* residual, int64_t activation,
                     Stream stream);

void run(LinearParams& params, const View& output, Stream stream);

}  // namespace pvk::linear
