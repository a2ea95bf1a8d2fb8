// Elementary functions of Vec<float> and Vec<double>: exp, log, log1p, sigmoid, sqrt. Errors are 1 to 2 units of
// rounding, subnormal results and arguments included; infinities and NaN are as in C.
//
// exp:  x = k ln2 + r with |r| <= ln2 / 2; exp(r) by a polynomial, times 2^k.
// log:  x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + R(s^2)) for
//       s = f / (2 + f), since log((1 + s) / (1 - s)) = 2 s + s R(s^2).
// The polynomials are minimax fits over those intervals, to a tenth of a unit or better.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace pvk::PVK_ISA {

template <typename T>
struct MathConstants;
template <>
struct MathConstants<float> {
  static constexpr int kMantissa = 23;
  static constexpr int32_t kBias = 127;
  static constexpr int32_t kSqrtHalfBits = 0x3f3504f3;
  static constexpr float kRounder = 0x1.8p23f;  // adding it leaves a whole number in the low bits
  static constexpr float kExpLow = -104.0f, kExpHigh = 89.0f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 1.428606765330187e-06f;  // the products k * high are exact
  static constexpr float kExp[] = {0.49999994f, 0.1666652f, 0.041668396f, 0.0083687864f, 0.0013814402f};
  static constexpr float kLog[] = {0.66666776f, 0.39977488f, 0.29873222f};
  static constexpr float kSmallest = 0x1p-126f, kScale = 0x1p24f;
  static constexpr int32_t kScaleExponent = 24;
};
template <>
struct MathConstants<double> {
  static constexpr int kMantissa = 52;
  static constexpr int64_t kBias = 1023;
  static constexpr int64_t kSqrtHalfBits = 0x3fe6a09e667f3bcd;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kExpLow = -746.0, kExpHigh = 710.0;
  static constexpr double kLn2High = 0.693147180559663, kLn2Low = 2.8235290563031577e-13;
  static constexpr double kExp[] = {0.5000000000000011,     0.1666666666666641,     0.04166666666652909,
                                    0.008333333333495598,   0.00138888889439478,    0.00019841269504924662,
                                    2.4801492738572477e-05, 2.7557587138536546e-06, 2.763038669100502e-07,
                                    2.5000043681004278e-08};
  static constexpr double kLog[] = {0.6666666666666735,  0.39999999999410973, 0.2857142874328425, 0.22222198474092356,
                                    0.18183569826874643, 0.1531390123280952,  0.14797526207222755};
  static constexpr double kSmallest = 0x1p-1022, kScale = 0x1p54;
  static constexpr int64_t kScaleExponent = 54;
};

// sum of coefficients[i] * x^i.
template <typename T, int N>
PVK_INLINE Vec<T> polynomial(const T (&coefficients)[N], Vec<T> x) {
  Vec<T> sum = splat(coefficients[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, splat(coefficients[i]));
  return sum;
}

// 2^k for k in the range of normal numbers.
template <typename T>
PVK_INLINE Vec<T> power_of_two(Mask<T> k) {
  using C = MathConstants<T>;
  return (Vec<T>)((k + C::kBias) << C::kMantissa);
}

template <typename T>
PVK_INLINE Vec<T> abs_of(Vec<T> x) {
  return (Vec<T>)((Mask<T>)x & ~(Mask<T>)splat(T(-0.0)));
}

// x * 2^(shifted - kRounder), in exp_of's range; subnormal results are rounded once, and 2^128 is infinity.
template <typename T>
PVK_INLINE Vec<T> times_power_of_two(Vec<T> x, Vec<T> shifted) {
  using C = MathConstants<T>;
#if defined(__AVX512F__)
  const Vec<T> whole = shifted - C::kRounder;
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_scalef_ps(__mmask16(-1), (__m512)x, (__m512)whole);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_scalef_pd(__mmask8(-1), (__m512d)x, (__m512d)whole);
#endif
  const Mask<T> k = (Mask<T>)shifted - (Mask<T>)splat(C::kRounder), half = k >> 1;
  return x * power_of_two<T>(half) * power_of_two<T>(k - half);
}

template <typename T>
PVK_INLINE Vec<T> exp_of(Vec<T> x) {
  using C = MathConstants<T>;
  x = at_most(at_least(x, C::kExpLow), C::kExpHigh);
  const Vec<T> shifted = x * T(1.4426950408889634) + C::kRounder;
  const Vec<T> whole = shifted - C::kRounder;
  Vec<T> r = fma(whole, splat(-C::kLn2High), x);
  r = fma(whole, splat(-C::kLn2Low), r);
  const Vec<T> power = fma(r * r, polynomial(C::kExp, r), r) + T(1);
  return times_power_of_two<T>(power, shifted);
}

// log(2^k (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)), about.
template <typename T>
PVK_INLINE Vec<T> log_reduced(Vec<T> f, Vec<T> k) {
  using C = MathConstants<T>;
  const Vec<T> s = f / (f + T(2)), z = s * s;
  const Vec<T> half_square = f * f * T(0.5);
  const Vec<T> rest = fma(s, fma(z, polynomial(C::kLog, z), half_square), k * C::kLn2Low);
  return fma(k, splat(C::kLn2High), f - (half_square - rest));
}

// k with x in 2^k [sqrt(1/2), sqrt(2)); x normal and positive.
template <typename T>
PVK_INLINE Mask<T> exponent_of(Vec<T> x) {
  using C = MathConstants<T>;
  return ((Mask<T>)x - C::kSqrtHalfBits) >> C::kMantissa;
}

template <typename T>
PVK_INLINE Vec<T> log_special(Vec<T> x, Vec<T> result) {  // of log(x), where x is not positive and finite
  const Vec<T> infinity = splat(T(__builtin_inf()));
  result = x == T(0) ? -infinity : x < T(0) ? splat(T(__builtin_nan(""))) : result;
  return x == infinity || x != x ? x : result;
}

template <typename T>
PVK_INLINE Vec<T> log_of(Vec<T> x) {
  using C = MathConstants<T>;
  const Mask<T> subnormal = x < C::kSmallest;
  const Vec<T> scaled = subnormal ? x * C::kScale : x;
  const Mask<T> k = exponent_of<T>(scaled);
  const Vec<T> f = (Vec<T>)((Mask<T>)scaled - (k << C::kMantissa)) - T(1);
  const Mask<T> power = k - (subnormal & C::kScaleExponent);
  return log_special<T>(x, log_reduced<T>(f, __builtin_convertvector(power, Vec<T>)));
}

// log(1 + x): what 1 + x loses to rounding is put back into f.
template <typename T>
PVK_INLINE Vec<T> log1p_of(Vec<T> x) {
  using C = MathConstants<T>;
  const Vec<T> sum = x + T(1);
  const Mask<T> k = exponent_of<T>(sum);
  const Mask<T> shift = k > C::kBias - 1 ? Mask<T>{} + (C::kBias - 1) : k;
  const Vec<T> lost = x - (sum - T(1));
  const Vec<T> f = ((Vec<T>)((Mask<T>)sum - (k << C::kMantissa)) - T(1)) + lost * power_of_two<T>(-shift);
  const Vec<T> result = log_special<T>(sum, log_reduced<T>(f, __builtin_convertvector(k, Vec<T>)));
  return x == T(0) ? x : result;
}

// 1 / (1 + exp(-x)); subnormal where that is.
template <typename T>
PVK_INLINE Vec<T> sigmoid_of(Vec<T> x) {
  const Vec<T> e = exp_of<T>(-abs_of<T>(x));
  const Vec<T> larger = T(1) / (e + T(1));
  return x < T(0) ? e * larger : larger;
}

PVK_INLINE Vec<float> sqrt_of(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(__mmask16(-1), x);  // the plain one warns in g++ 12
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

PVK_INLINE Vec<double> sqrt_of(Vec<double> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(__mmask8(-1), x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#elif defined(__x86_64__)
  return _mm_sqrt_pd(x);
#else
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
#endif
}

}  // namespace pvk::PVK_ISA
