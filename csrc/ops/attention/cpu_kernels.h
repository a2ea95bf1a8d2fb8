// What the dispatcher finds in other files.
#pragma once

#include "ops/attention/attention.h"

namespace pvk::attention::PVK_ISA {

void backward(const AttentionBackwardParams& params);

}  // namespace pvk::attention::PVK_ISA
