// Taps of small windows straight from a row, without a copy of it: what lies outside of the row is padding.
#pragma once

#include "core/pool_rows.h"

namespace pvk::PVK_ISA {

// Which lanes of the loads of a register of outputs are pixels: bits, the same for every row.
struct TapMasks {
  uint32_t inside[4];
  bool all;
};

// Bits of the lanes of [x, x + lanes) that are in [0, width).
PVK_INLINE uint32_t lanes_inside(int64_t x, int64_t width, int64_t lanes) {
  const int64_t low = min_of(max_of(-x, int64_t(0)), lanes), high = min_of(max_of(width - x, low), lanes);
  return ((uint32_t(1) << high) - 1) & ~((uint32_t(1) << low) - 1);
}

// Of outputs that are S pixels apart, for tap 0 of the first at pixel x.
template <int K, int S, typename T>
PVK_INLINE TapMasks tap_masks(int64_t x, int64_t width) {
  constexpr int64_t kLane = kLanes<T>;
  constexpr uint32_t kAll = (uint32_t(1) << kLane) - 1;
  TapMasks masks{};
  masks.all = true;
  for (int load = 0; load < (S == 1 ? K : K == 3 ? 4 : 2); ++load) {
    masks.inside[load] = lanes_inside(S == 1 ? x + load : x + load / 2 * 2 + load % 2 * kLane, width, kLane);
    masks.all = masks.all && masks.inside[load] == kAll;
  }
  return masks;
}

// The pixels that are there, converted, and `padding` in the other lanes.
template <typename scalar_t, typename T>
PVK_INLINE Vec<T> load_masked(const scalar_t* source, uint32_t inside, Vec<T> padding) {
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 4) {
    return (Vec<T>)_mm512_mask_loadu_ps((__m512)padding, __mmask16(inside), source);
  } else if constexpr (sizeof(scalar_t) == 8) {
    return (Vec<T>)_mm512_mask_loadu_pd((__m512d)padding, __mmask8(inside), source);
  } else {
    const Vec<T> pixels = widen(_mm256_maskz_loadu_epi16(__mmask16(inside), source), scalar_t());
    return (Vec<T>)_mm512_mask_mov_ps((__m512)padding, __mmask16(inside), (__m512)pixels);
  }
#else
  Vec<T> result = padding;
  for (int lane = 0; lane < kLanes<T>; ++lane)
    if (inside >> lane & 1) result[lane] = T(to_float(source[lane]));
  return result;
#endif
}

// Taps 0, ..., K - 1 of kLanes outputs that are S pixels apart; tap 0 of the first is *source.
template <int K, int S, typename scalar_t, typename T>
PVK_INLINE void load_taps(const scalar_t* source, const TapMasks& masks, Vec<T> padding, Vec<T>* taps) {
  static_assert(S == 1 || (S == 2 && K <= 3));
  constexpr int64_t kLane = kLanes<T>;
  if constexpr (S == 1) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k)
      taps[k] = masks.all ? load(source + k) : load_masked<scalar_t, T>(source + k, masks.inside[k], padding);
  } else if (masks.all) {
    load_even_odd<scalar_t, T>(source, taps[0], taps[1]);
    if constexpr (K == 3) {
      Vec<T> odd;
      load_even_odd<scalar_t, T>(source + 2, taps[2], odd);
    }
  } else {
    const DeinterleaveMasks<T> order;
    const Vec<T> first = load_masked<scalar_t, T>(source, masks.inside[0], padding);
    const Vec<T> second = load_masked<scalar_t, T>(source + kLane, masks.inside[1], padding);
    taps[0] = __builtin_shuffle(first, second, order.even);
    taps[1] = __builtin_shuffle(first, second, order.odd);
    if constexpr (K == 3) {
      const Vec<T> third = load_masked<scalar_t, T>(source + 2, masks.inside[2], padding);
      const Vec<T> fourth = load_masked<scalar_t, T>(source + 2 + kLane, masks.inside[3], padding);
      taps[2] = __builtin_shuffle(third, fourth, order.even);
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
