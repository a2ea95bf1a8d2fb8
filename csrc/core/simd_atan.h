// The arc tangent of a vector, to about one unit in the last place.
//
// On [-1, 1] an odd polynomial, of Chebyshev interpolation; beyond, pi / 2 less that of the reciprocal.
#pragma once

#include "core/simd.h"

namespace pvk::PVK_ISA {

template <typename T>
struct AtanTraits;  // atan(x) = x + x^3 P(x^2); pi / 2 as a sum of two numbers
template <>
struct AtanTraits<float> {
  static constexpr float polynomial[] = {-0.3333333173f,  0.1999973933f,  -0.1427856875f,
                                         0.1103376412f,   -0.0865688043f, 0.06250169445f,
                                         -0.03587153898f, 0.01350777143f, -0.002386997317f};
  static constexpr float half_pi = 1.5707964f, half_pi_rest = -4.37113900e-8f;
};
template <>
struct AtanTraits<double> {
  static constexpr double polynomial[] = {
      -0.3333333333333333025,  0.199999999999975322,    -0.1428571428538413154,    0.111111110934908281,
      -0.09090908590891934225, 0.07692298971033216917,  -0.06666564699289104211,   0.05881506877793656067,
      -0.05257973334284110807, 0.04737749579527778972,  -0.04260356632601652133,   0.03749486812535247112,
      -0.03127718906699638479, 0.02369673158004862201,  -0.01553515247541417613,   0.008368931178450162136,
      -0.00349588597391630952, 0.001049603508496851507, -0.0001999618937790138206, 0.0000180619546186121522};
  static constexpr double half_pi = 1.5707963267948966, half_pi_rest = 6.123233995736766e-17;
};

template <typename T>
PVK_INLINE Vec<T> atan_impl(Vec<T> x) {
  using Traits = AtanTraits<T>;
  constexpr int kTerms = sizeof(Traits::polynomial) / sizeof(T);
  const Vec<T> one = splat(T(1));
  const Mask<T> negative = x < Vec<T>{};
  const Vec<T> size = negative ? -x : x;
  const Mask<T> steep = size > one;
  const Vec<T> y = steep ? one / size : size;
  const Vec<T> z = y * y;
  Vec<T> sum = splat(Traits::polynomial[kTerms - 1]);
#pragma GCC unroll 32
  for (int i = kTerms - 2; i >= 0; --i) sum = fma(sum, z, splat(Traits::polynomial[i]));
  const Vec<T> flat = fma(sum, z * y, y);
  const Vec<T> angle = steep ? splat(Traits::half_pi) - (flat - splat(Traits::half_pi_rest)) : flat;
  return negative ? -angle : angle;
}

PVK_INLINE Vec<float> atan(Vec<float> x) {
  return atan_impl<float>(x);
}
PVK_INLINE Vec<double> atan(Vec<double> x) {
  return atan_impl<double>(x);
}

}  // namespace pvk::PVK_ISA
