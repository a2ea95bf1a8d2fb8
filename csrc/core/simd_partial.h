// Loads and stores of fewer than kLanes elements: the tails of rows. Never touches memory beyond them.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/simd.h"

namespace pvk::PVK_ISA {

// All ones in the lanes below `count`.
template <typename T>
PVK_INLINE Mask<T> first_lanes(int64_t count) {
  Mask<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < Mask<T>{} + decltype(lane[0] + 0)(count);
}

#if defined(__AVX512F__)
PVK_INLINE Vec<float> widen(__m256i raw, BFloat16) {
  return (Vec<float>)_mm512_maskz_slli_epi32(__mmask16(-1), _mm512_maskz_cvtepu16_epi32(__mmask16(-1), raw), 16);
}
PVK_INLINE Vec<float> widen(__m256i raw, Float16) {
  return _mm512_maskz_cvtph_ps(__mmask16(-1), raw);
}
PVK_INLINE __m256i narrow(Vec<float> value, BFloat16) {
  return _mm512_maskz_cvtepi32_epi16(__mmask16(-1), (__m512i)round_to_bfloat16(value));
}
PVK_INLINE __m256i narrow(Vec<float> value, Float16) {
  return _mm512_maskz_cvtps_ph(__mmask16(-1), value, _MM_FROUND_TO_NEAREST_INT);
}
#endif

// The first `count` elements, converted; zeros in the other lanes.
template <typename scalar_t>
PVK_INLINE Vec<opmath_t<scalar_t>> load_first(const scalar_t* source, int64_t count) {
  using T = opmath_t<scalar_t>;
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 4) return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), source);
  if constexpr (sizeof(scalar_t) == 8) return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), source);
  if constexpr (sizeof(scalar_t) == 2)
    return widen(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), source), scalar_t());
#elif defined(__AVX2__)
  if constexpr (sizeof(scalar_t) == 4) return (Vec<T>)_mm256_maskload_ps(source, (__m256i)first_lanes<T>(count));
  if constexpr (sizeof(scalar_t) == 8) return (Vec<T>)_mm256_maskload_pd(source, (__m256i)first_lanes<T>(count));
#endif
  scalar_t part[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = source[i];
  return load(part);
}

template <typename scalar_t>
PVK_INLINE void store_first(scalar_t* target, Vec<opmath_t<scalar_t>> value, int64_t count) {
  using T = opmath_t<scalar_t>;
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 4)
    return _mm512_mask_storeu_ps(target, __mmask16((1u << count) - 1), (__m512)value);
  if constexpr (sizeof(scalar_t) == 8)
    return _mm512_mask_storeu_pd(target, __mmask8((1u << count) - 1), (__m512d)value);
  if constexpr (sizeof(scalar_t) == 2)
    return _mm256_mask_storeu_epi16(target, __mmask16((1u << count) - 1), narrow(value, scalar_t()));
#elif defined(__AVX2__)
  if constexpr (sizeof(scalar_t) == 4)
    return _mm256_maskstore_ps(target, (__m256i)first_lanes<T>(count), (__m256)value);
  if constexpr (sizeof(scalar_t) == 8)
    return _mm256_maskstore_pd(target, (__m256i)first_lanes<T>(count), (__m256d)value);
#endif
  scalar_t part[kLanes<T>];
  store(part, value);
  for (int64_t i = 0; i < count; ++i) target[i] = part[i];
}

}  // namespace pvk::PVK_ISA
