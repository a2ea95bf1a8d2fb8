// The maximum of pooling, of registers.
#pragma once

#include "core/simd.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// The larger one; NaN if either is.
template <typename T>
PVK_INLINE Vec<T> pool_max(Vec<T> a, Vec<T> b) {
  return a > b || a != a ? a : b;
}

}  // namespace pvk::conv2d::PVK_ISA
