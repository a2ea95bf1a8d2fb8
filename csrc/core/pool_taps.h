// Taps of small windows straight from a row, without a copy of it: what lies outside of the row is padding.
#pragma once

#include "core/pool_rows.h"

namespace pvk::PVK_ISA {

// Bits of the lanes of [x, x + lanes) that are in [0, width).
PVK_INLINE uint64_t lanes_inside(int64_t x, int64_t width, int64_t lanes) {
  const int64_t low = min_of(max_of(-x, int64_t(0)), lanes), high = min_of(max_of(width - x, low), lanes);
  const uint64_t below_high = high == 64 ? ~uint64_t(0) : (uint64_t(1) << high) - 1;
  return below_high & ~((uint64_t(1) << low) - 1);
}

// Pixels x, x + 1, ... of a row, converted; `padding` where there is none.
template <typename scalar_t>
PVK_INLINE Vec<opmath_t<scalar_t>> load_padded(const scalar_t* row, int64_t x, int64_t width,
                                               opmath_t<scalar_t> padding) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>;
  if (x >= 0 && x + kLane <= width) return load(row + x);
#if defined(__AVX512F__)
  const uint64_t inside = lanes_inside(x, width, kLane);
  if constexpr (sizeof(scalar_t) == 4) {
    return (Vec<T>)_mm512_mask_loadu_ps((__m512)splat(padding), __mmask16(inside), row + x);
  } else if constexpr (sizeof(scalar_t) == 8) {
    return (Vec<T>)_mm512_mask_loadu_pd((__m512d)splat(padding), __mmask8(inside), row + x);
  } else {
    scalar_t raw[kLane];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(raw), _mm256_maskz_loadu_epi16(__mmask16(inside), row + x));
    return (Vec<T>)_mm512_mask_mov_ps((__m512)splat(padding), __mmask16(inside), (__m512)load(raw));
  }
#else
  T lanes[kLane];
  for (int64_t i = 0; i < kLane; ++i) lanes[i] = x + i >= 0 && x + i < width ? T(to_float(row[x + i])) : padding;
  return load(lanes);
#endif
}

// Taps 0, ..., K - 1 of kLanes outputs that are S pixels apart; tap 0 of the first is pixel x.
template <int K, int S, typename scalar_t, typename T>
PVK_INLINE void load_taps(const scalar_t* row, int64_t x, int64_t width, T padding, Vec<T>* taps) {
  static_assert(S == 1 || (S == 2 && K <= 3));
  constexpr int64_t kLane = kLanes<T>;
  if constexpr (S == 1) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) taps[k] = load_padded(row, x + k, width, padding);
  } else {
    if (x >= 0 && x + 2 * kLane + (K == 3 ? 2 : 0) <= width) {
      load_even_odd<scalar_t, T>(row + x, taps[0], taps[1]);
      if constexpr (K == 3) {
        Vec<T> odd;
        load_even_odd<scalar_t, T>(row + x + 2, taps[2], odd);
      }
      return;
    }
    const DeinterleaveMasks<T> masks;
    const Vec<T> first = load_padded(row, x, width, padding), second = load_padded(row, x + kLane, width, padding);
    taps[0] = __builtin_shuffle(first, second, masks.even);
    taps[1] = __builtin_shuffle(first, second, masks.odd);
    if constexpr (K == 3) {
      const Vec<T> third = load_padded(row, x + 2, width, padding);
      const Vec<T> fourth = load_padded(row, x + 2 + kLane, width, padding);
      taps[2] = __builtin_shuffle(third, fourth, masks.even);
    }
  }
}

// Whether load_taps serves these windows: square ones of 2 or 3 pixels, 1 or 2 apart, in planes.
PVK_INLINE bool has_small_windows(const PoolAxis& rows, const PoolAxis& columns, int64_t group) {
  return group == 1 && rows.kernel == columns.kernel && (rows.kernel == 2 || rows.kernel == 3) && columns.stride <= 2 &&
         rows.dilation == 1 && columns.dilation == 1;
}

// The sum of a register's lanes, halves first.
template <typename T>
PVK_INLINE T sum_lanes(Vec<T> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)value);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_add_pd((__m512d)value);
#endif
  T total = value[0];
  for (int lane = 1; lane < kLanes<T>; ++lane) total += value[lane];
  return total;
}

}  // namespace pvk::PVK_ISA
