// The largest of a register's lanes, where NaN is left to the sum of exponentials that follows.
#pragma once

#include <utility>

#include "core/moments.h"
#include "core/simd.h"

namespace pvk::PVK_ISA {

// The larger; not of NaN, which the sum of exponentials keeps.
template <typename T>
PVK_INLINE Vec<T> larger_of(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_max_ps(__mmask16(-1), (__m512)b, (__m512)a);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)b, (__m512d)a);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)b, (__m256)a);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_max_pd((__m256d)b, (__m256d)a);
#endif
  return a < b ? b : a;
}

template <typename T, int Bit = kLanes<T> / 2>
PVK_INLINE T largest_of_lanes(Vec<T> value) {
  if constexpr (Bit == 0) return value[0];
  if constexpr (Bit > 0) {
    value = larger_of<T>(value, lanes_apart<T, Bit>(value, std::make_integer_sequence<int, kLanes<T>>{}));
    return largest_of_lanes<T, Bit / 2>(value);
  }
}

}  // namespace pvk::PVK_ISA
