// Register-wide vectors of float and double for the instruction set that this copy is compiled for, and the
// conversions of the 16-bit types. Arithmetic operators are the compiler's own; multiply-adds are written out as
// fma(), because the build turns implicit contraction off.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/types.h"

namespace pvk::PVK_ISA {

#if defined(__AVX512F__)
inline constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kRegisterBytes = 32;
#else
inline constexpr int kRegisterBytes = 16;
#endif

#define PVK_INLINE inline __attribute__((always_inline))

template <typename T>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float type __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t mask __attribute__((vector_size(kRegisterBytes)));
};
template <>
struct VecTraits<double> {
  typedef double type __attribute__((vector_size(kRegisterBytes)));
  typedef int64_t mask __attribute__((vector_size(kRegisterBytes)));
};

template <typename T>
using Vec = typename VecTraits<T>::type;
template <typename T>
using Mask = typename VecTraits<T>::mask;
template <typename T>
inline constexpr int kLanes = kRegisterBytes / int(sizeof(T));

// The type that a kernel computes in.
template <typename scalar_t>
struct OpMath {
  using type = float;
};
template <>
struct OpMath<double> {
  using type = double;
};
template <typename scalar_t>
using opmath_t = typename OpMath<scalar_t>::type;

template <typename T>
PVK_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

PVK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

PVK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// The larger, the smaller of x and a limit; NaN stays.
PVK_INLINE Vec<float> at_least(Vec<float> x, float low) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(__mmask16(-1), splat(low), x);  // the plain one warns in g++ 12
#elif defined(__AVX2__)
  return _mm256_max_ps(splat(low), x);
#elif defined(__x86_64__)
  return _mm_max_ps(splat(low), x);
#else
  return x < low ? splat(low) : x;
#endif
}

PVK_INLINE Vec<float> at_most(Vec<float> x, float high) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(__mmask16(-1), splat(high), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(splat(high), x);
#elif defined(__x86_64__)
  return _mm_min_ps(splat(high), x);
#else
  return x > high ? splat(high) : x;
#endif
}

PVK_INLINE Vec<double> at_least(Vec<double> x, double low) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_pd(__mmask8(-1), splat(low), x);
#elif defined(__AVX2__)
  return _mm256_max_pd(splat(low), x);
#elif defined(__x86_64__)
  return _mm_max_pd(splat(low), x);
#else
  return x < low ? splat(low) : x;
#endif
}

PVK_INLINE Vec<double> at_most(Vec<double> x, double high) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_pd(__mmask8(-1), splat(high), x);
#elif defined(__AVX2__)
  return _mm256_min_pd(splat(high), x);
#elif defined(__x86_64__)
  return _mm_min_pd(splat(high), x);
#else
  return x > high ? splat(high) : x;
#endif
}

// ---- scalar conversions ----

PVK_INLINE float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

PVK_INLINE float to_float(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  float result;
  if (magnitude < 0x0400) {  // zero and subnormals: exact in float
    result = float(magnitude) * 0x1p-24f;
    uint32_t bits;
    std::memcpy(&bits, &result, 4);
    bits |= sign;
    std::memcpy(&result, &bits, 4);
    return result;
  }
  const uint32_t exponent = magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u;
  const uint32_t bits = sign | ((magnitude << 13) + exponent);
  std::memcpy(&result, &bits, 4);
  return result;
#endif
}

PVK_INLINE float to_float(float value) {
  return value;
}
PVK_INLINE double to_float(double value) {
  return value;
}

template <typename scalar_t>
PVK_INLINE scalar_t from_float(opmath_t<scalar_t> value) {
  return value;
}

template <>
PVK_INLINE BFloat16 from_float<BFloat16>(float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {uint16_t((bits >> 16) | 0x0040)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
PVK_INLINE Float16 from_float<Float16>(float value) {  // round to nearest even
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                   // below 2^-14: a subnormal, one unit is 2^-24
    float absolute;
    std::memcpy(&absolute, &magnitude, 4);
    const float shifted = absolute + 0.5f;  // 2^-24 is the unit of floats in [0.5, 1): the addition rounds
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, 4);
    return {uint16_t(sign | (rounded - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {uint16_t(sign | ((rounded - 0x38000000) >> 13))};
#endif
}

// ---- vector loads and stores of kLanes elements, unaligned, converting ----

template <typename T>
PVK_INLINE Vec<T> load(const T* source) {
  Vec<T> result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

template <typename T>
PVK_INLINE void store(T* target, Vec<T> value) {
  std::memcpy(target, &value, sizeof(value));
}

typedef uint32_t VecU32 __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t HalfVecU16 __attribute__((vector_size(kRegisterBytes / 2)));

PVK_INLINE Vec<float> load(const BFloat16* source) {
  HalfVecU16 raw;
  std::memcpy(&raw, source, sizeof(raw));
  return (Vec<float>)(__builtin_convertvector(raw, VecU32) << 16);
}

// The bits of a bfloat16 in the low half of each lane, rounded to nearest even; NaN stays NaN.
PVK_INLINE VecU32 round_to_bfloat16(Vec<float> value) {
  const VecU32 bits = (VecU32)value;
  const VecU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU32 quiet = (bits >> 16) | 0x0040;
  const VecU32 is_nan = (VecU32)(value != value);
  return (quiet & is_nan) | (rounded & ~is_nan);
}

PVK_INLINE void store(BFloat16* target, Vec<float> value) {
  const HalfVecU16 raw = __builtin_convertvector(round_to_bfloat16(value), HalfVecU16);
  std::memcpy(target, &raw, sizeof(raw));
}

PVK_INLINE Vec<float> load(const Float16* source) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  Vec<float> result;
  for (int lane = 0; lane < kLanes<float>; ++lane) result[lane] = to_float(source[lane]);
  return result;
#endif
}

PVK_INLINE void store(Float16* target, Vec<float> value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) target[lane] = from_float<Float16>(value[lane]);
#endif
}

// ---- two vectors of 2 * kLanes neighbours, in the order that converts fastest; store_pair undoes load_pair ----

template <typename scalar_t, typename T>
PVK_INLINE void load_pair(const scalar_t* source, Vec<T>& first, Vec<T>& second) {
  first = load(source);
  second = load(source + kLanes<T>);
}

template <typename scalar_t, typename T>
PVK_INLINE void store_pair(scalar_t* target, Vec<T> first, Vec<T> second) {
  store(target, first);
  store(target + kLanes<T>, second);
}

template <>
PVK_INLINE void load_pair<BFloat16, float>(const BFloat16* source, Vec<float>& even, Vec<float>& odd) {
  VecU32 raw;
  std::memcpy(&raw, source, sizeof(raw));
  even = (Vec<float>)(raw << 16);
  odd = (Vec<float>)(raw & 0xffff0000u);
}

template <>
PVK_INLINE void store_pair<BFloat16, float>(BFloat16* target, Vec<float> even, Vec<float> odd) {
  const VecU32 raw = round_to_bfloat16(even) | (round_to_bfloat16(odd) << 16);
  std::memcpy(target, &raw, sizeof(raw));
}

// ---- masks: all ones where true ----

template <typename T>
PVK_INLINE bool any(Mask<T> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)mask) != 0;
  return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  for (int lane = 0; lane < kLanes<T>; ++lane)
    if (mask[lane]) return true;
  return false;
#endif
}

}  // namespace pvk::PVK_ISA
