// Position-sensitive RoI align and RoI pool: parameters, backend interface, and the weights along an axis.
//
// N images, C channels of the output, H x W feature map; K RoIs, PH x PW bins each. The map has C * PH * PW planes:
// bin (ph, pw) of channel c reads plane (c * PH + ph) * PW + pw. Both ops are separable, and differ in the weights
// along an axis alone: bin = sum over y, x of wy[y] wx[x] plane[y][x], divided by a divisor of each axis.
// Source: Dai et al., "R-FCN", 2016, section 2; the borders follow torchvision.ops.ps_roi_align and ps_roi_pool.
#pragma once

#include "core/math.h"
#include "core/types.h"
#include "ops/roi_align/roi_align.h"

namespace pvk::ps_roi_align {

using roi_align::RoiAxis;
using roi_align::SampleRange;
using roi_align::Tap;

// Strides count elements; map and pooled may have any.
struct PsRoiParams {
  void* map;          // [N, C * PH * PW, H, W]. forward: the features. backward: their gradient, all of it written.
  void* pooled;       // [K, C, PH, PW]. forward: the output, all of it written. backward: its gradient, read.
  const void* boxes;  // [K, 5]: (batch index, x1, y1, x2, y2)
  DType dtype;        // of map and pooled
  DType boxes_dtype;
  int64_t N, C, H, W, K, PH, PW;
  int64_t map_stride[4];
  int64_t pooled_stride[4];
  int64_t boxes_stride[2];
  double spatial_scale;
  int64_t sampling_ratio;  // align: samples per bin and axis; adaptive where <= 0
  bool pool;               // whole pixels instead of bilinear samples
};

// Backend interface.
void forward(const PsRoiParams& params, Stream stream);
void backward(const PsRoiParams& params, Stream stream);

// ---- geometry: T is float, or double for float64 features ----

// To the nearest whole number, halves away from zero.
template <typename T>
PVK_HOST_DEVICE T round_half_away(T value) {
  const T size = value < T(0) ? -value : value;
  if (!(size < T(4e15))) return value;  // whole, or NaN
  const T whole = T(int64_t(size));
  const T rounded = size - whole >= T(0.5) ? whole + T(1) : whole;
  return value < T(0) ? -rounded : rounded;
}

// Pool: bin p has the pixels from start + floor(p * bin) up to start + ceil((p + 1) * bin); `grid` only says whether
// there are any. False where the axis is not finite.
template <typename T>
PVK_HOST_DEVICE bool make_axis(const PsRoiParams& p, T low, T high, int64_t bins, RoiAxis<T>& axis) {
  if (!p.pool) return roi_align::make_axis(low, high, T(p.spatial_scale), bins, p.sampling_ratio, true, axis);
  axis.start = round_half_away(mul_rn(low, T(p.spatial_scale)));
  const T length = round_half_away(mul_rn(high, T(p.spatial_scale))) - axis.start;
  axis.bin = max_of(length, T(1)) / T(bins);
  axis.grid = T(1);
  return is_finite(axis.start) && is_finite(length);
}

// One RoI. `image` is -1 where its result is defined as zeros: a coordinate that is not finite, or a batch index
// outside [0, N); it then has no samples.
template <typename T>
struct Roi {
  int64_t image;
  RoiAxis<T> y, x;
};

template <typename T>
PVK_HOST_DEVICE Roi<T> make_roi(const PsRoiParams& p, T batch, T x1, T y1, T x2, T y2) {
  Roi<T> roi;
  const bool finite_y = make_axis(p, y1, y2, p.PH, roi.y);
  const bool finite_x = make_axis(p, x1, x2, p.PW, roi.x);
  const bool in_batch = batch > T(-1) && batch < T(p.N);  // truncated toward zero, as torchvision does
  roi.image = finite_y && finite_x && in_batch ? int64_t(batch) : -1;
  if (roi.image < 0) roi.y = roi.x = {T(0), T(0), T(0)};
  return roi;
}

// Pool: the pixels of bin p. As in torchvision, the last row and the last column of the map are never read.
template <typename T>
PVK_HOST_DEVICE SampleRange pixel_range(const RoiAxis<T>& axis, int64_t p, int64_t size) {
  const double last = double(max_of(size - 1, int64_t(0)));
  const double first = double(axis.start) - double(roi_align::ceil_of(-mul_rn(T(p), axis.bin)));
  const double end = double(axis.start) + double(roi_align::ceil_of(mul_rn(T(p + 1), axis.bin)));
  if (!(axis.grid > T(0))) return {0, 0};
  const int64_t begin = int64_t(min_of(max_of(first, 0.0), last));
  return {begin, max_of(begin, int64_t(min_of(max_of(end, 0.0), last)))};
}

// Calls add(pixel, weight) for each tap of bin p, with pixels in [0, size). A pixel may come more than once, a weight
// may be 0; the order is that of the samples.
template <typename T, typename Add>
PVK_HOST_DEVICE void for_each_tap(const PsRoiParams& params, const RoiAxis<T>& axis, int64_t p, int64_t size,
                                  const Add& add) {
  if (params.pool) {
    const SampleRange pixels = pixel_range(axis, p, size);
    for (int64_t i = pixels.begin; i < pixels.end; ++i) add(i, T(1));
    return;
  }
  const SampleRange samples = roi_align::sample_range(axis, p, size, params.sampling_ratio <= 0);
  for (int64_t i = samples.begin; i < samples.end; ++i) {
    const Tap<T> tap = roi_align::make_tap(roi_align::sample_position(axis, p, i), size);
    add(tap.low, tap.low_weight);
    add(tap.high, tap.high_weight);
  }
}

// At most so many different pixels have a weight in any one bin. Ends beyond 2^24 are rounded in float.
template <typename T>
PVK_HOST_DEVICE int64_t most_taps(const PsRoiParams& params, const RoiAxis<T>& axis, int64_t size) {
  const T rounding = axis.bin * T(max_of(params.PH, params.PW)) * T(4e-7);
  const T wanted = params.pool ? axis.bin + rounding + T(2) : T(2) * axis.grid;
  return wanted < T(size) ? int64_t(wanted) : size;
}

// What the weights of bin p are divided by: the number of its samples, or pixels.
template <typename T>
PVK_HOST_DEVICE T divisor_of(const PsRoiParams& params, const RoiAxis<T>& axis, int64_t p, int64_t size) {
  if (!params.pool) return max_of(axis.grid, T(1));
  const SampleRange pixels = pixel_range(axis, p, size);
  return T(max_of(pixels.end - pixels.begin, int64_t(1)));
}

}  // namespace pvk::ps_roi_align
