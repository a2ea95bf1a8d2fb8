// Boxes of the NMS kernels: loads, and the test that decides.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/nms/nms.h"

namespace pvk::nms {

template <typename T>
struct alignas(16) Box {
  T x1, y1, x2, y2;
};

template <typename T>
PVK_DEVICE Box<T> load_box(const void* boxes, DType dtype, int64_t begin, int64_t stride) {
  T corner[4];
  load_strided(boxes, dtype, begin, stride, corner);
  return {corner[0], corner[1], corner[2], corner[3]};
}

// One element, as float or double.
template <typename T>
PVK_DEVICE T load_score(const void* scores, DType dtype, int64_t index) {
  T score[1];
  load_strided(scores, dtype, index, 0, score);
  return score[0];
}

// Equal groups have equal bits.
PVK_DEVICE uint64_t load_group(const void* groups, int bytes, int64_t index) {
  switch (bytes) {
    case 1:
      return __ldg(static_cast<const uint8_t*>(groups) + index);
    case 2:
      return __ldg(static_cast<const uint16_t*>(groups) + index);
    case 4:
      return __ldg(static_cast<const unsigned*>(groups) + index);
    default:
      return __ldg(static_cast<const unsigned long long*>(groups) + index);
  }
}

template <typename T>
PVK_DEVICE T area_of(const Box<T>& box) {
  return mul_rn(sub_rn(box.x2, box.x1), sub_rn(box.y2, box.y1));
}

// The order of the operands decides where NaN goes: box i comes first.
template <typename T>
PVK_DEVICE T intersection(const Box<T>& i, const Box<T>& j) {
  const T w = max_of(T(0), sub_rn(min_of(i.x2, j.x2), max_of(i.x1, j.x1)));
  const T h = max_of(T(0), sub_rn(min_of(i.y2, j.y2), max_of(i.y1, j.y1)));
  return mul_rn(w, h);
}

template <typename T>
PVK_DEVICE T iou_of(T inter, T i_area, T j_area) {
  return div_rn(inter, sub_rn(add_rn(i_area, j_area), inter));
}

// Whether box i, which comes first, suppresses box j.
template <typename T>
PVK_DEVICE bool suppresses(const Box<T>& i, T i_area, const Box<T>& j, T j_area, double iou_threshold) {
  const T inter = intersection(i, j);
  // Then the quotient is 0 or NaN: no division.
  if (!(inter > T(0)) && iou_threshold >= 0) return false;
  return double(iou_of(inter, i_area, j_area)) > iou_threshold;
}

}  // namespace pvk::nms
