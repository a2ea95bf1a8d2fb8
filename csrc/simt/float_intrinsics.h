// The floating-point intrinsics. Those that approximate on a GPU (__expf, __fdividef, rsqrtf, ...) round to nearest
// here.
#pragma once

#include <math.h>
#include <stdlib.h>

#include <bit>
#include <cstdint>

#include "simt/rounding.h"

// ---- bit patterns ----

inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}
inline int __double2hiint(double x) {
  return int(std::bit_cast<uint64_t>(x) >> 32);
}
inline int __double2loint(double x) {
  return int(std::bit_cast<uint64_t>(x));
}
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(uint64_t(unsigned(high)) << 32 | unsigned(low));
}

// ---- arithmetic of one rounding: the exact result as an odd double, then to float ----

namespace simt {

inline float to_float(double odd, Round round) {
  return std::bit_cast<float>(narrow<8, 23>(odd, round));
}

inline double odd_divide(double a, double b) {
  const double quotient = a / b;
  if (quotient - quotient != 0 || quotient == 0 || b - b != 0) return quotient;
  const double error = std::fma(-quotient, b, a);
  return make_odd(quotient, error == 0 ? 0 : (error > 0) == (b > 0) ? 1 : -1);
}

inline double odd_sqrt(double x) {
  const double root = std::sqrt(x);
  if (root - root != 0 || root == 0) return root;
  const double error = std::fma(-root, root, x);
  return make_odd(root, error > 0 ? 1 : error < 0 ? -1 : 0);
}

// Sums of nothing but zeros are -0 where a GPU rounds down, unless both are +0.
inline double odd_sum(double product, double c, Round round) {
  const double sum = odd_fma(product, 1, c);
  if (sum != 0 || round != Round::kDown || (!std::signbit(product) && !std::signbit(c))) return sum;
  return -0.0;
}

}  // namespace simt

#define SIMT_ROUNDED(suffix, round)                                                                 \
  inline float __fadd_##suffix(float a, float b) {                                                  \
    return simt::to_float(simt::odd_sum(a, b, simt::Round::round), simt::Round::round);             \
  }                                                                                                 \
  inline float __fsub_##suffix(float a, float b) {                                                  \
    return __fadd_##suffix(a, -b);                                                                  \
  }                                                                                                 \
  inline float __fmul_##suffix(float a, float b) {                                                  \
    return simt::to_float(double(a) * b, simt::Round::round);                                       \
  }                                                                                                 \
  inline float __fdiv_##suffix(float a, float b) {                                                  \
    return simt::to_float(simt::odd_divide(a, b), simt::Round::round);                              \
  }                                                                                                 \
  inline float __fmaf_##suffix(float a, float b, float c) {                                         \
    return simt::to_float(simt::odd_sum(double(a) * b, c, simt::Round::round), simt::Round::round); \
  }                                                                                                 \
  inline float __fsqrt_##suffix(float x) {                                                          \
    return simt::to_float(simt::odd_sqrt(x), simt::Round::round);                                   \
  }                                                                                                 \
  inline float __double2float_##suffix(double x) {                                                  \
    return simt::to_float(x, simt::Round::round);                                                   \
  }
SIMT_ROUNDED(rz, kZero)
SIMT_ROUNDED(rd, kDown)
SIMT_ROUNDED(ru, kUp)
#undef SIMT_ROUNDED

#define SIMT_RECIPROCAL(suffix)           \
  inline float __frcp_##suffix(float x) { \
    return __fdiv_##suffix(1.0f, x);      \
  }

inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
inline float __fsqrt_rn(float x) {
  return sqrtf(x);
}
inline float __double2float_rn(double x) {
  return float(x);
}
SIMT_RECIPROCAL(rn)
SIMT_RECIPROCAL(rz)
SIMT_RECIPROCAL(rd)
SIMT_RECIPROCAL(ru)
#undef SIMT_RECIPROCAL

inline double __dadd_rn(double a, double b) {
  return a + b;
}
inline double __dsub_rn(double a, double b) {
  return a - b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __ddiv_rn(double a, double b) {
  return a / b;
}
inline double __drcp_rn(double x) {
  return 1 / x;
}
inline double __dsqrt_rn(double x) {
  return sqrt(x);
}
inline double __fma_rn(double a, double b, double c) {
  return fma(a, b, c);
}

// ---- functions; glibc declares some of these names, hence noexcept ----

inline float __fdividef(float a, float b) {
  return a / b;
}
inline float fdividef(float a, float b) {
  return a / b;
}
inline float __saturatef(float x) {
  return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f;
}
inline float rsqrtf(float x) {
  return float(1 / sqrt(double(x)));
}
inline double rsqrt(double x) {
  return 1 / sqrt(x);
}
inline float __frsqrt_rn(float x) {
  return rsqrtf(x);
}
inline float __expf(float x) noexcept {
  return expf(x);
}
inline float __exp10f(float x) noexcept {
  return float(pow(10.0, double(x)));
}
inline float __logf(float x) noexcept {
  return logf(x);
}
inline float __log2f(float x) noexcept {
  return log2f(x);
}
inline float __log10f(float x) noexcept {
  return log10f(x);
}
inline float __powf(float x, float y) noexcept {
  return powf(x, y);
}
inline float __sinf(float x) noexcept {
  return sinf(x);
}
inline float __cosf(float x) noexcept {
  return cosf(x);
}
inline float __tanf(float x) noexcept {
  return tanf(x);
}
inline void __sincosf(float x, float* sine, float* cosine) noexcept {
  *sine = sinf(x);
  *cosine = cosf(x);
}

// ---- conversions ----

#define SIMT_TO_INTEGERS(suffix, round)          \
  SIMT_TO_INTEGER(int, int, suffix, round)       \
  SIMT_TO_INTEGER(unsigned, uint, suffix, round) \
  SIMT_TO_INTEGER(long long, ll, suffix, round)  \
  SIMT_TO_INTEGER(unsigned long long, ull, suffix, round)
#define SIMT_TO_INTEGER(Int, name, suffix, round)                   \
  inline Int __float2##name##_##suffix(float x) {                   \
    return simt::to_integer<Int>(x, simt::Round::round, false);     \
  }                                                                 \
  inline Int __double2##name##_##suffix(double x) {                 \
    return simt::to_integer<Int>(x, simt::Round::round, true);      \
  }                                                                 \
  inline float __##name##2float_##suffix(Int x) {                   \
    return simt::to_float(simt::odd_double(x), simt::Round::round); \
  }
SIMT_TO_INTEGERS(rn, kNearest)
SIMT_TO_INTEGERS(rz, kZero)
SIMT_TO_INTEGERS(rd, kDown)
SIMT_TO_INTEGERS(ru, kUp)
#undef SIMT_TO_INTEGERS
#undef SIMT_TO_INTEGER

inline double __int2double_rn(int x) {
  return x;
}
inline double __uint2double_rn(unsigned x) {
  return x;
}
inline double __ll2double_rn(long long x) {
  return double(x);
}
inline double __ull2double_rn(unsigned long long x) {
  return double(x);
}
