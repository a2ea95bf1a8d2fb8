// The parts of max pooling on the CPU, each a file of its own, and the comparison that they share.
#pragma once

#include "core/simd.h"
#include "ops/max_pool2d/max_pool2d.h"

namespace pvk::max_pool2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Planes, and channels_last maps with few channels: registers along rows.
void forward_rows(const MaxPool2dParams& p);
// Planes with wide or uneven windows that all have a pixel; columns are not dilated.
void forward_windows(const MaxPool2dParams& p);
void backward_rows(const MaxPool2dParams& p);
// channels_last: registers along channels.
void forward_channels(const MaxPool2dParams& p);
void backward_channels(const MaxPool2dParams& p);

template <typename T>
using place_t = decltype(Mask<T>{}[0] + 0);

// Where value is larger, or NaN, it becomes the best, and its place the place.
template <bool kPlaces>
PVK_INLINE void take_larger(Vec<float>& best, Mask<float>& place, Vec<float> value, Mask<float> here) {
#if defined(__AVX512F__)
  const __mmask16 wins = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  best = _mm512_mask_mov_ps(best, wins, value);
  if constexpr (kPlaces) place = (Mask<float>)_mm512_mask_mov_epi32((__m512i)place, wins, (__m512i)here);
#else
  const Mask<float> wins = (value > best) | (value != value);
  best = (Vec<float>)(((Mask<float>)value & wins) | ((Mask<float>)best & ~wins));
  if constexpr (kPlaces) place = (here & wins) | (place & ~wins);
#endif
}

template <bool kPlaces>
PVK_INLINE void take_larger(Vec<double>& best, Mask<double>& place, Vec<double> value, Mask<double> here) {
#if defined(__AVX512F__)
  const __mmask8 wins = _mm512_cmp_pd_mask(value, best, _CMP_GT_OQ) | _mm512_cmp_pd_mask(value, value, _CMP_UNORD_Q);
  best = _mm512_mask_mov_pd(best, wins, value);
  if constexpr (kPlaces) place = (Mask<double>)_mm512_mask_mov_epi64((__m512i)place, wins, (__m512i)here);
#else
  const Mask<double> wins = (value > best) | (value != value);
  best = (Vec<double>)(((Mask<double>)value & wins) | ((Mask<double>)best & ~wins));
  if constexpr (kPlaces) place = (here & wins) | (place & ~wins);
#endif
}

PVK_INLINE void store_places(int32_t* target, Mask<float> places, int64_t count) {
  int32_t lanes[kLanes<float>];
  std::memcpy(lanes, &places, sizeof(lanes));
  if (count >= kLanes<float>) {
    std::memcpy(target, lanes, sizeof(lanes));
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = lanes[i];
  }
}
PVK_INLINE void store_places(int32_t* target, Mask<double> places, int64_t count) {
  for (int64_t i = 0; i < kLanes<double> && i < count; ++i) target[i] = int32_t(places[i]);
}

template <typename T>
PVK_INLINE Mask<T> load_mask(const place_t<T>* source) {
  Mask<T> mask;
  std::memcpy(&mask, source, sizeof(mask));
  return mask;
}

template <typename T>
PVK_INLINE void store_mask(place_t<T>* target, Mask<T> mask) {
  std::memcpy(target, &mask, sizeof(mask));
}

}  // namespace pvk::max_pool2d::PVK_ISA
