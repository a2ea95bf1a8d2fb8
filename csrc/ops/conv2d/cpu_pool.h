// What a kernel does to its sums without leaving the registers: cheap activations, and the maximum of pooling.
#pragma once

#include "core/epilogue.h"
#include "core/simd.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Activations that are a few operations on a register: clamping, and hardswish. The others go through finish_rows().
template <typename T>
struct CheapActivation {
  bool is_cheap, is_hardswish, has_low, has_high;

  explicit CheapActivation(Activation activation)
      : is_cheap(activation == Activation::kNone || activation == Activation::kRelu ||
                 activation == Activation::kRelu6 || activation == Activation::kHardswish),
        is_hardswish(activation == Activation::kHardswish),
        has_low(activation == Activation::kRelu || activation == Activation::kRelu6),
        has_high(activation == Activation::kRelu6) {}

  template <int kCount>
  PVK_INLINE void apply(Vec<T> (&x)[kCount]) const {
    if (is_hardswish) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) x[i] = activate<Activation::kHardswish, T>(x[i]);
    } else {
      if (has_low) {
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) x[i] = at_least(x[i], T(0));
      }
      if (has_high) {
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) x[i] = at_most(x[i], T(6));
      }
    }
  }
};

// The larger one; NaN if either is.
template <typename T>
PVK_INLINE Vec<T> pool_max(Vec<T> a, Vec<T> b) {
  return a > b || a != a ? a : b;
}

}  // namespace pvk::conv2d::PVK_ISA
