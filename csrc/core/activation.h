// The activations that a kernel applies to its result. Values are those of pyvision_kernels/_activation.py.
#pragma once

#include <cstdint>

namespace pvk {

enum class Activation : int32_t { kNone, kRelu, kRelu6, kHardswish, kSilu, kGelu, kSigmoid };

}  // namespace pvk
