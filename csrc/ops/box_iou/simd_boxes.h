// Boxes between memory, four numbers a box, and vectors, a number of kLanes boxes each.
#pragma once

#include "core/simd.h"
#include "core/simd_atan.h"
#include "core/transpose.h"
#include "ops/box_iou/pair.h"

namespace pvk::box_iou::PVK_ISA {

using namespace pvk::PVK_ISA;

template <typename T>
struct EvenOddMasks {
  Mask<T> even, odd;
  constexpr EvenOddMasks() : even{}, odd{} {
    for (int i = 0; i < kLanes<T>; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
    }
  }
};

// Boxes [0, count) of `source`, count <= kLanes; the lanes beyond are zeros.
template <typename scalar_t, typename T>
PVK_INLINE void load_boxes(const scalar_t* source, int64_t box_stride, int64_t coordinate_stride, int64_t count,
                           Vec<T> (&c)[4]) {
  constexpr int kSide = kLanes<T>;
  if (count >= kSide && box_stride == 4 && coordinate_stride == 1) {
    const EvenOddMasks<T> masks;
    const Vec<T> rows[4] = {load(source), load(source + kSide), load(source + 2 * kSide), load(source + 3 * kSide)};
    const Vec<T> x01 = __builtin_shuffle(rows[0], rows[1], masks.even);
    const Vec<T> y01 = __builtin_shuffle(rows[0], rows[1], masks.odd);
    const Vec<T> x23 = __builtin_shuffle(rows[2], rows[3], masks.even);
    const Vec<T> y23 = __builtin_shuffle(rows[2], rows[3], masks.odd);
    c[0] = __builtin_shuffle(x01, x23, masks.even);
    c[1] = __builtin_shuffle(y01, y23, masks.even);
    c[2] = __builtin_shuffle(x01, x23, masks.odd);
    c[3] = __builtin_shuffle(y01, y23, masks.odd);
    return;
  }
  T tile[4][kSide] = {};
  for (int64_t box = 0; box < count && box < kSide; ++box)
    for (int i = 0; i < 4; ++i) tile[i][box] = T(to_float(source[box * box_stride + i * coordinate_stride]));
  for (int i = 0; i < 4; ++i) c[i] = load(tile[i]);
}

// Into [count, 4], contiguous, count <= kLanes.
template <typename scalar_t, typename T>
PVK_INLINE void store_boxes(scalar_t* target, int64_t count, const Vec<T> (&c)[4]) {
  constexpr int kSide = kLanes<T>;
  const TransposeMasks<T> masks;
  const Vec<T> x_low = __builtin_shuffle(c[0], c[2], masks.low), x_high = __builtin_shuffle(c[0], c[2], masks.high);
  const Vec<T> y_low = __builtin_shuffle(c[1], c[3], masks.low), y_high = __builtin_shuffle(c[1], c[3], masks.high);
  const Vec<T> rows[4] = {__builtin_shuffle(x_low, y_low, masks.low), __builtin_shuffle(x_low, y_low, masks.high),
                          __builtin_shuffle(x_high, y_high, masks.low), __builtin_shuffle(x_high, y_high, masks.high)};
  if (count >= kSide) {
    for (int i = 0; i < 4; ++i) store(target + i * kSide, rows[i]);
    return;
  }
  T tile[4 * kSide];
  for (int i = 0; i < 4; ++i) store(tile + i * kSide, rows[i]);
  for (int64_t i = 0; i < 4 * count; ++i) target[i] = from_float<scalar_t>(tile[i]);
}

template <Kind kKind, typename T>
PVK_INLINE Box<Vec<T>> prepare_box(Format format, const Vec<T> (&c)[4], const Constants<Vec<T>>& constants) {
  Box<Vec<T>> box = make_box<kKind>(format, c, constants);
  if constexpr (kKind == Kind::kComplete) {
    const Sides<Vec<T>> sides = sides_of(format, c);
    box.angle = atan(sides.width / sides.height);
  }
  return box;
}

template <typename T>
PVK_INLINE Constants<Vec<T>> constants_of(double union_eps, double enclosing_eps, double alpha_eps) {
  return Constants<Vec<T>>::make(union_eps, enclosing_eps, alpha_eps, [](double value) { return splat(T(value)); });
}

}  // namespace pvk::box_iou::PVK_ISA
