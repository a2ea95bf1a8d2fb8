// The activations on a value of a kernel's computing type.
#pragma once

#include "core/activation.h"
#include "core/warp.cuh"

namespace pvk {

PVK_DEVICE float exp_of(float x) {
  return expf(x);
}
PVK_DEVICE double exp_of(double x) {
  return exp(x);
}
// One instruction; 0 below 2^-126.
PVK_DEVICE float exp2_approx(float x) {
#if defined(PVK_SIMT)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
PVK_DEVICE float erf_of(float x) {
  return erff(x);
}
PVK_DEVICE double erf_of(double x) {
  return erf(x);
}

template <typename T>
PVK_DEVICE T activate(Activation activation, T x) {
  switch (activation) {  // comparisons are such that NaN stays NaN
    case Activation::kRelu:
      return x < T(0) ? T(0) : x;
    case Activation::kRelu6:
      return x < T(0) ? T(0) : x > T(6) ? T(6) : x;
    case Activation::kHardswish:
      return x * (x < T(-3) ? T(0) : x > T(3) ? T(6) : x + T(3)) / T(6);
    case Activation::kSilu:
      return x / (T(1) + exp_of(-x));
    case Activation::kGelu:
      return T(0.5) * x * (T(1) + erf_of(x * T(0.70710678118654752440)));
    case Activation::kSigmoid:
      return T(1) / (T(1) + exp_of(-x));
    case Activation::kNone:
      break;
  }
  return x;
}

// Of N values: the choice is made once.
template <int N, typename T>
PVK_DEVICE void activate_all(Activation activation, T (&x)[N]) {
  const auto each = [&](Activation known) __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = activate(known, x[i]);
  };
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return each(Activation::kRelu);
    case Activation::kRelu6:
      return each(Activation::kRelu6);
    case Activation::kHardswish:
      return each(Activation::kHardswish);
    case Activation::kSilu:
      return each(Activation::kSilu);
    case Activation::kGelu:
      return each(Activation::kGelu);
    case Activation::kSigmoid:
      return each(Activation::kSigmoid);
  }
}

}  // namespace pvk
