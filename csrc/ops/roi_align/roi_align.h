// RoI align on one feature map or on a pyramid of them: parameters, backend interface, and the sampling geometry that
// every backend shares.
//
// N images, C channels, H x W feature map of a level; K RoIs, PH x PW bins each.
// Source: He et al., "Mask R-CNN", 2017, section 3; the borders follow torchvision.ops.roi_align.
#pragma once

#include "core/math.h"
#include "core/types.h"

namespace pvk::roi_align {

// Samples per bin and axis that a caller may ask for.
constexpr int64_t kMaxSamplingRatio = 4096;

// Feature maps that one call may have.
constexpr int kMaxLevels = 16;

// A number in both precisions, since a GPU is slow to convert.
struct Real {
  double wide;
  float single;

  template <typename T>
  PVK_HOST_DEVICE T as() const {
    if constexpr (sizeof(T) == 8) return wide;
    return single;
  }
};

// One feature map, [N, C, H, W] seen through any strides.
struct Level {
  void* map;  // forward: the features, read. backward: their gradient, every element written.
  int64_t H, W;
  int64_t stride[4];
  Real scale;  // feature pixels per image pixel
};

// Strides count elements. The pooled tensor is [K, C, PH, PW], forward in one of two dense layouts.
struct RoiAlignParams {
  Level levels[kMaxLevels];
  Real areas[kMaxLevels];  // ascending: a RoI's level is how many of the first num_areas its area reaches
  int num_levels, num_areas;
  void* pooled;       // forward: the output, every element written. backward: its gradient, read.
  const void* boxes;  // [K, 5]: (batch index, x1, y1, x2, y2)
  DType dtype;        // of maps and pooled
  DType boxes_dtype;
  int64_t N, C, K, PH, PW;
  int64_t pooled_stride[4];
  int64_t boxes_stride[2];
  int64_t sampling_ratio;  // samples per bin and axis; adaptive where <= 0
  bool aligned;
  bool channels_last;  // layout of the tensors that are written
};

// Backend interface.
void forward(const RoiAlignParams& params, Stream stream);
void backward(const RoiAlignParams& params, Stream stream);

// ---- geometry: T is float, or double for float64 features; products are rounded, so that all devices agree ----

// One axis of a RoI: sample i of bin p lies at start + p * bin + (i + 0.5) * bin / grid, 0 <= i < grid.
template <typename T>
struct RoiAxis {
  T start;
  T bin;
  T grid;  // a whole number; as T because an adaptive grid can exceed every integer type; 0: no samples
};

// Where bin p can have samples inside the map: samples [begin, end) and perhaps a few outside.
struct SampleRange {
  int64_t begin, end;
};

template <typename T>
PVK_HOST_DEVICE T floor_of(T value) {
  // |value| < 2^62 is the caller's duty.
  T whole = T(int64_t(value));
  return whole > value ? whole - T(1) : whole;
}

template <typename T>
PVK_HOST_DEVICE T ceil_of(T value) {
  // From 2^23 (2^52) on, every T is whole.
  if (!(value < T(4e15)) || !(value > T(-4e15))) return value;
  return -floor_of(-value);
}

// False where the axis is not finite: such a RoI gives zeros.
template <typename T>
PVK_HOST_DEVICE bool make_axis(T low, T high, T scale, int64_t pooled, int64_t sampling_ratio, bool aligned,
                               RoiAxis<T>& axis) {
  const T offset = aligned ? T(0.5) : T(0);
  axis.start = mul_rn(low, scale) - offset;
  T length = mul_rn(high, scale) - offset - axis.start;
  if (!is_finite(axis.start) || !is_finite(length)) return false;
  if (!aligned) length = max_of(length, T(1));
  axis.bin = length / T(pooled);
  axis.grid = sampling_ratio > 0 ? T(sampling_ratio) : max_of(ceil_of(length / T(pooled)), T(0));
  return true;
}

template <typename T>
PVK_HOST_DEVICE T sample_position(const RoiAxis<T>& axis, int64_t p, int64_t i) {
  return axis.start + mul_rn(T(p), axis.bin) + mul_rn(T(i) + T(0.5), axis.bin) / axis.grid;
}

// Samples outside [-1, size] contribute nothing, so only those near the map are visited: an adaptive grid has one
// to two samples a pixel, hence at most 2 * size + 8 visits however large the RoI is.
template <typename T>
PVK_HOST_DEVICE SampleRange sample_range(const RoiAxis<T>& axis, int64_t p, int64_t size, bool adaptive) {
  if (!adaptive || axis.grid <= T(2 * size + 8)) return {0, int64_t(axis.grid)};
  const double per_pixel = double(axis.grid) / double(axis.bin);  // adaptive: bin > 0
  const double base = double(axis.start) + double(p) * double(axis.bin);
  const double first = (-1.0 - base) * per_pixel - 2.5;
  const double last = max_of(-1.0, min_of(double(axis.grid), 4e18));
  const int64_t begin = int64_t(min_of(max_of(first, 0.0), max_of(last, 0.0)));
  const double stop = (double(size) - base) * per_pixel + 2.5;
  const int64_t end = int64_t(min_of(max_of(stop, 0.0), max_of(last, 0.0)));
  return {begin, min_of(end, begin + 2 * size + 8)};
}

// The two pixels under a sample, and their weights; both weights are 0 outside the map.
template <typename T>
struct Tap {
  int64_t low, high;
  T low_weight, high_weight;
};

template <typename T>
PVK_HOST_DEVICE Tap<T> make_tap(T position, int64_t size) {
  // Written so that NaN takes the safe branch.
  if (!(position >= T(-1) && position <= T(size)) || size == 0) return {0, 0, T(0), T(0)};
  const T inside = max_of(position, T(0));
  const int64_t low = int64_t(inside);
  if (low >= size - 1) return {size - 1, size - 1, T(1), T(0)};
  const T fraction = inside - T(low);
  return {low, low + 1, T(1) - fraction, fraction};
}

// The level that a RoI is pooled from; -1 where it has none: its area is negative or NaN, or it belongs to a level
// beyond the maps. Areas are compared, and nothing computed of them, so that all devices agree.
template <typename T>
PVK_HOST_DEVICE int choose_level(const RoiAlignParams& p, T x1, T y1, T x2, T y2) {
  if (p.num_levels == 1) return 0;
  const T area = mul_rn(sub_rn(x2, x1), sub_rn(y2, y1));
  if (!(area >= T(0))) return -1;
  int level = 0;
  while (level < p.num_areas && area >= p.areas[level].template as<T>()) ++level;
  return level < p.num_levels ? level : -1;
}

// One RoI. `image` is -1 where its result is defined as zeros: a coordinate that is not finite, a batch index outside
// [0, N), or no level.
template <typename T>
struct Roi {
  int64_t image;
  int level;  // always that of a map
  RoiAxis<T> y, x;
  T inverse_count;  // 1 / samples per bin
};

template <typename T>
PVK_HOST_DEVICE Roi<T> make_roi(const RoiAlignParams& p, T batch, T x1, T y1, T x2, T y2) {
  Roi<T> roi;
  const int level = choose_level(p, x1, y1, x2, y2);
  roi.level = max_of(level, 0);
  const T scale = p.levels[roi.level].scale.template as<T>();
  const bool finite_y = make_axis(y1, y2, scale, p.PH, p.sampling_ratio, p.aligned, roi.y);
  const bool finite_x = make_axis(x1, x2, scale, p.PW, p.sampling_ratio, p.aligned, roi.x);
  const bool in_batch = batch > T(-1) && batch < T(p.N);  // truncated toward zero, as torchvision does
  roi.image = level >= 0 && finite_y && finite_x && in_batch ? int64_t(batch) : -1;
  roi.inverse_count = T(1) / max_of(roi.y.grid * roi.x.grid, T(1));
  return roi;
}

}  // namespace pvk::roi_align
