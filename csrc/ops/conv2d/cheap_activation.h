// What a kernel does to its sums without leaving the registers: cheap activations, and the maximum of pooling.
#pragma once

#include "core/epilogue.h"
#include "core/simd.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Activations that are a few operations on a register: clamping, and hardswish. The others go through finish_rows().
template <typename T>
struct CheapActivation {
  bool is_cheap, is_hardswish;
  T low, high;

  explicit CheapActivation(Activation activation)
      : is_cheap(activation == Activation::kNone || activation == Activation::kRelu ||
                 activation == Activation::kRelu6 || activation == Activation::kHardswish),
        is_hardswish(activation == Activation::kHardswish),
        low(activation == Activation::kNone ? T(-__builtin_inf()) : T(0)),
        high(activation == Activation::kRelu6 ? T(6) : T(__builtin_inf())) {}

  template <int kCount>
  PVK_INLINE void apply(Vec<T> (&x)[kCount]) const {
    if (is_hardswish) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) x[i] = activate<Activation::kHardswish, T>(x[i]);
    } else {
      const Vec<T> lowest = splat(low), highest = splat(high);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {  // NaN stays
        x[i] = x[i] < lowest ? lowest : x[i];
        x[i] = x[i] > highest ? highest : x[i];
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
