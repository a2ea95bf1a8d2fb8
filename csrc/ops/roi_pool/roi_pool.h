// RoI max pooling: parameters, backend interface, and the geometry of the bins that every backend shares.
//
// N images, C channels, H x W feature map; K RoIs, PH x PW bins each.
// Source: Girshick, "Fast R-CNN", 2015, section 2.1; the rounding follows torchvision.ops.roi_pool.
#pragma once

#include "core/math.h"
#include "core/types.h"

namespace pvk::roi_pool {

// A bin starts from here: what is not greater (NaN too) is never its maximum.
constexpr float kLowest = -3.402823466e38f;

// Strides count elements. The map is [N, C, H, W]; pooled and argmax are [K, C, PH, PW].
struct RoiPoolParams {
  void* map;          // forward: the features, read. backward: their gradient, every element written.
  void* pooled;       // forward: the output, every element written. backward: its gradient, read.
  int32_t* argmax;    // y * W + x of each maximum, -1 where there is none. Forward: written. Backward: read.
  const void* boxes;  // [K, 5]: (batch index, x1, y1, x2, y2)
  DType dtype;        // of map and pooled
  DType boxes_dtype;
  int64_t N, C, H, W, K, PH, PW;
  int64_t map_stride[4];
  int64_t pooled_stride[4];
  int64_t argmax_stride[4];  // forward: those of pooled
  int64_t boxes_stride[2];
  double spatial_scale;
  bool channels_last;  // layout of what is written
};

// Backend interface.
void forward(const RoiPoolParams& params, Stream stream);
void backward(const RoiPoolParams& params, Stream stream);

// ---- geometry: T is float, or double for float64 features; products are rounded, so that all devices agree ----

// From 2^52 on every double is whole; infinities and NaN pass through.
PVK_HOST_DEVICE double whole_part(double value) {
  return value < 4503599627370496.0 && value > -4503599627370496.0 ? double(int64_t(value)) : value;
}

PVK_HOST_DEVICE double round_half_away(double value) {
  const double whole = whole_part(value);
  const double rest = value - whole;
  return rest >= 0.5 ? whole + 1.0 : rest <= -0.5 ? whole - 1.0 : whole;
}

// One axis of a RoI: bin p covers [start + floor(p * bin), start + ceil((p + 1) * bin)).
template <typename T>
struct RoiAxis {
  double start;  // a whole number, exact up to 2^52
  T bin;         // positive
};

// False where the axis is not finite: such a RoI gives zeros.
template <typename T>
PVK_HOST_DEVICE bool make_axis(T low, T high, T scale, int64_t pooled, RoiAxis<T>& axis) {
  const double first = round_half_away(double(mul_rn(low, scale)));
  const double last = round_half_away(double(mul_rn(high, scale)));
  if (!is_finite(first) || !is_finite(last)) return false;
  const T length = T(max_of(last - first + 1.0, 1.0));  // both ends are inside; an inverted box has one pixel
  axis.start = first;
  axis.bin = length / T(pooled);
  return is_finite(length);
}

struct PixelRange {
  int64_t begin, end;  // empty where end <= begin
};

template <typename T>
PVK_HOST_DEVICE PixelRange bin_range(const RoiAxis<T>& axis, int64_t p, int64_t size) {
  const double low = whole_part(double(mul_rn(T(p), axis.bin)));
  const double high = double(mul_rn(T(p + 1), axis.bin));
  const double whole = whole_part(high);
  const double begin = axis.start + low, end = axis.start + (high > whole ? whole + 1.0 : whole);
  return {int64_t(min_of(max_of(begin, 0.0), double(size))), int64_t(min_of(max_of(end, 0.0), double(size)))};
}

// One RoI. `image` is -1 where its result is defined as zeros: a coordinate that is not finite, or a batch index
// outside [0, N).
template <typename T>
struct Roi {
  int64_t image;
  RoiAxis<T> y, x;
};

template <typename T>
PVK_HOST_DEVICE Roi<T> make_roi(const RoiPoolParams& p, T batch, T x1, T y1, T x2, T y2) {
  Roi<T> roi;
  const bool finite_y = make_axis(y1, y2, T(p.spatial_scale), p.PH, roi.y);
  const bool finite_x = make_axis(x1, x2, T(p.spatial_scale), p.PW, roi.x);
  const bool in_batch = batch > T(-1) && batch < T(p.N);  // truncated toward zero, as torchvision does
  roi.image = finite_y && finite_x && in_batch ? int64_t(batch) : -1;
  return roi;
}

}  // namespace pvk::roi_pool
