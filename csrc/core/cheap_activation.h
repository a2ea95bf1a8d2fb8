// Activations that are a few operations on a register: clamping, and hardswish. Kernels apply them to their sums
// without storing these; the others go through finish_rows().
#pragma once

#include "core/activation.h"
#include "core/epilogue.h"
#include "core/simd.h"

namespace pvk::PVK_ISA {

template <typename T>
struct CheapActivation {
  bool is_cheap, is_hardswish, has_low, has_high;

  explicit CheapActivation(Activation activation)
      : is_cheap(activation == Activation::kNone || activation == Activation::kRelu ||
                 activation == Activation::kRelu6 || activation == Activation::kHardswish),
        is_hardswish(activation == Activation::kHardswish),
        has_low(activation == Activation::kRelu || activation == Activation::kRelu6),
        has_high(activation == Activation::kRelu6) {}

  // Calls each(operation), which applies it to every register: the choice is made outside of its loops.
  template <typename Each>
  PVK_INLINE void apply(const Each& each) const {
    if (is_hardswish)
      each([](Vec<T> x) __attribute__((always_inline)) { return activate<Activation::kHardswish, T>(x); });
    if (has_low) each([](Vec<T> x) __attribute__((always_inline)) { return at_least(x, T(0)); });
    if (has_high) each([](Vec<T> x) __attribute__((always_inline)) { return at_most(x, T(6)); });
  }
};

}  // namespace pvk::PVK_ISA
