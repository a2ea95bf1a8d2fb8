// Resizing of maps: parameters, backend interface, and which pixels an output reads with what weights.
//
// N images, C channels; H x W the map, OH x OW what it is resized to. Both axes are apart: an output is a sum of pixels
// by the product of a weight of their row and one of their column. Source: PyTorch's interpolate; indices are
// computed as there, step by step in the same precision.
#pragma once

#include "core/math.h"
#include "core/types.h"

namespace pvk::interpolate {

enum class Filter : int32_t { kNearest, kNearestExact, kLinear, kCubic, kLinearAntialias, kCubicAntialias };

struct ResizeAxis {
  int64_t size, outputs;
  Filter filter;
  bool align_corners;  // not of the nearest pixel
  double factor;       // outputs to a pixel, as the caller gave it; 0: outputs / size

  PVK_HOST_DEVICE bool antialiased() const {
    return filter == Filter::kLinearAntialias || filter == Filter::kCubicAntialias;
  }
  PVK_HOST_DEVICE bool chooses() const { return filter == Filter::kNearest || filter == Filter::kNearestExact; }

  // Pixels to an output.
  template <typename T>
  PVK_HOST_DEVICE T scale() const {
    if (align_corners) return outputs > 1 ? div_rn(T(size - 1), T(outputs - 1)) : T(0);
    return factor > 0 ? T(div_rn(1.0, factor)) : div_rn(T(size), T(outputs));
  }

  // Of scale 1 and more the filter is as much wider.
  template <typename T>
  PVK_HOST_DEVICE T support() const {
    const T half = filter == Filter::kLinearAntialias ? T(1) : T(2), wide = scale<T>();
    return wide >= T(1) ? mul_rn(half, wide) : half;
  }

  // The most taps of an output.
  template <typename T>
  PVK_HOST_DEVICE int64_t most_taps() const {
    if (chooses()) return 1;
    if (!antialiased()) return filter == Filter::kLinear ? 2 : 4;
    const int64_t half = clamped(double(support<T>()), size);
    return min_of((half + (T(half) < support<T>() ? 1 : 0)) * 2 + 1, max_of(size, int64_t(1)));
  }

  // The pixel of tap k: beyond the border it is the last one again.
  PVK_HOST_DEVICE int64_t pixel(int64_t start, int64_t k) const {
    const bool stays = filter == Filter::kLinear && outputs == size;  // both taps of an output are one pixel
    return min_of(max_of(start + (stays ? 0 : k), int64_t(0)), size - 1);
  }

  // The taps of output o: pixel(start, k) by weights[k], k below count.
  template <typename T>
  PVK_HOST_DEVICE void taps(int64_t o, int64_t& start, int64_t& count, T* weights) const {
    count = 1;
    weights[0] = T(1);
    if (chooses() || (antialiased() && outputs == size)) {
      start = chooses() ? chosen(o) : o;
      return;
    }
    if (antialiased()) return antialiased_taps(o, start, count, weights);
    count = most_taps<T>();
    const bool cubic = filter == Filter::kCubic;
    if (!cubic && outputs == size) {
      start = o;
      weights[1] = T(0);
      return;
    }
    T place = mul_rn(scale<T>(), align_corners ? T(o) : add_rn(T(o), T(0.5)));
    if (!align_corners) place = sub_rn(place, T(0.5));
    if (!cubic && place < T(0)) place = T(0);
    start = floor_below(float(place), size);
    const T t = min_of(max_of(sub_rn(place, T(start)), T(0)), T(1)), rest = sub_rn(T(1), t);
    if (!cubic) {
      weights[0] = rest;
      weights[1] = t;
      return;
    }
    start -= 1;
    constexpr T kSharpness = T(-0.75);
    weights[0] = cubic_outer(T(1) + t, kSharpness);
    weights[1] = cubic_inner(t, kSharpness);
    weights[2] = cubic_inner(rest, kSharpness);
    weights[3] = cubic_outer(T(1) + rest, kSharpness);
  }

 private:
  // As an integer in [0, most]; NaN is 0.
  PVK_HOST_DEVICE static int64_t clamped(double value, int64_t most) {
    if (!(value > 0)) return 0;
    return value < double(most) ? int64_t(value) : most;
  }

  // The floor, at most size - 1.
  PVK_HOST_DEVICE static int64_t floor_below(float value, int64_t size) {
    if (!(value < float(size))) return size - 1;
    const int64_t whole = int64_t(value);
    return min_of(whole - (float(whole) > value ? 1 : 0), size - 1);
  }

  // In float32 whatever the dtype is.
  PVK_HOST_DEVICE int64_t chosen(int64_t o) const {
    if (filter == Filter::kNearestExact)
      return floor_below(float(mul_rn(double(o) + 0.5, double(scale<float>()))), size);
    if (outputs == size) return o;
    if (outputs == 2 * size) return o >> 1;
    return floor_below(mul_rn(float(o), scale<float>()), size);
  }

  template <typename T>
  PVK_HOST_DEVICE void antialiased_taps(int64_t o, int64_t& start, int64_t& count, T* weights) const {
    const T wide = scale<T>(), reach = support<T>(), center = T(mul_rn(double(wide), double(o) + 0.5));
    const T narrow = wide >= T(1) ? T(div_rn(1.0, double(wide))) : T(1);
    start = clamped(double(sub_rn(center, reach)) + 0.5, size);
    const int64_t end = clamped(double(add_rn(center, reach)) + 0.5, size);
    count = min_of(max_of(end - start, int64_t(0)), most_taps<T>());
    T sum = T(0);
    for (int64_t k = 0; k < count; ++k) {
      const T distance = T(mul_rn(double(sub_rn(T(start + k), center)) + 0.5, double(narrow)));
      weights[k] = antialiasing(distance < T(0) ? -distance : distance);
      sum = add_rn(sum, weights[k]);
    }
    if (sum == T(0)) return;
    for (int64_t k = 0; k < count; ++k) weights[k] = div_rn(weights[k], sum);
  }

  template <typename T>
  PVK_HOST_DEVICE T antialiasing(T x) const {
    if (filter == Filter::kLinearAntialias) return x < T(1) ? sub_rn(T(1), x) : T(0);
    constexpr T kSharpness = T(-0.5);
    return x < T(1) ? cubic_inner(x, kSharpness) : x < T(2) ? cubic_outer(x, kSharpness) : T(0);
  }

  // Keys' cubic convolution at a distance below 1, and from 1 to 2.
  template <typename T>
  PVK_HOST_DEVICE static T cubic_inner(T x, T a) {
    return add_rn(mul_rn(mul_rn(sub_rn(mul_rn(a + T(2), x), a + T(3)), x), x), T(1));
  }
  template <typename T>
  PVK_HOST_DEVICE static T cubic_outer(T x, T a) {
    return sub_rn(mul_rn(add_rn(mul_rn(sub_rn(mul_rn(a, x), T(5) * a), x), T(8) * a), x), T(4) * a);
  }
};

// Strides count elements. Maps are planes or channels_last: kernels may rely on column (channel) stride 1, and on a
// pixel stride of C in channels_last. What is written is dense.
struct InterpolateParams {
  const void* from;  // [N, C, H, W]; backward the gradient of the resized map, [N, C, OH, OW]
  void* to;          // [N, C, OH, OW], backward [N, C, H, W]; every element written
  void* scratch;     // scratch_bytes(params) bytes on the device
  DType dtype;
  int64_t N, C;
  ResizeAxis rows, columns;
  bool backward;  // a pixel adds the gradients of the outputs that read it, each by its weight there
  int64_t from_stride[4], to_stride[4];
  bool channels_last;
};

// Backend interface. `scratch_bytes` is asked with the dtype and the axes set.
void resize(const InterpolateParams& params, Stream stream);
int64_t scratch_bytes(const InterpolateParams& params);

}  // namespace pvk::interpolate
