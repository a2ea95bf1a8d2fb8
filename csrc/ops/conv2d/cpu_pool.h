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

// Of a window of 2 x 2 pixels: two of each row, `pixel` elements apart.
template <typename scalar_t>
PVK_INLINE Vec<opmath_t<scalar_t>> pool_window(const scalar_t* upper, const scalar_t* lower, int64_t pixel) {
  using T = opmath_t<scalar_t>;
  return pool_max<T>(pool_max<T>(load(upper), load(upper + pixel)), pool_max<T>(load(lower), load(lower + pixel)));
}

}  // namespace pvk::conv2d::PVK_ISA
