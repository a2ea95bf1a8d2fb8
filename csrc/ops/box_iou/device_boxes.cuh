// Boxes for the CUDA kernels: four numbers from memory, and a box with its angle.
#pragma once

#include "core/warp.cuh"
#include "ops/box_iou/pair.h"

namespace pvk::box_iou {

template <typename T>
PVK_DEVICE Constants<Rounded<T>> constants_of(double union_eps, double enclosing_eps, double alpha_eps) {
  return Constants<Rounded<T>>::make(union_eps, enclosing_eps, alpha_eps,
                                     [](double value) { return Rounded<T>{T(value)}; });
}

template <typename scalar_t, typename T>
PVK_DEVICE void load_coordinates(const void* boxes, int64_t begin, int64_t stride, Rounded<T> (&c)[4]) {
  T raw[4];
  load_strided<T, scalar_t>(boxes, begin, stride, raw);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i].value = raw[i];
}

PVK_DEVICE float atan_of(float value) {
  return atanf(value);
}
PVK_DEVICE double atan_of(double value) {
  return atan(value);
}

template <Kind kKind, typename T>
PVK_DEVICE Box<Rounded<T>> prepare_box(Format format, const Rounded<T> (&c)[4],
                                       const Constants<Rounded<T>>& constants) {
  Box<Rounded<T>> box = make_box<kKind>(format, c, constants);
  if constexpr (kKind == Kind::kComplete) {
    const Sides<Rounded<T>> sides = sides_of(format, c);
    box.angle.value = atan_of((sides.width / sides.height).value);
  }
  return box;
}

}  // namespace pvk::box_iou
