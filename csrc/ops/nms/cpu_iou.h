// One box against kLanes kept boxes at a time: does one of them suppress it?
//
// The decision is torchvision's arithmetic, rounding for rounding.
#pragma once

#include "core/math.h"
#include "core/simd.h"

namespace pvk::nms::PVK_ISA {

using namespace pvk::PVK_ISA;

template <typename T>
struct Box {
  T x1, y1, x2, y2, area;
};

// kLanes kept boxes; unused lanes overlap nothing.
template <typename T>
struct Chunk {
  T x1[kLanes<T>], y1[kLanes<T>], x2[kLanes<T>], y2[kLanes<T>], area[kLanes<T>];
  int64_t next, count;

  void clear(int64_t next_chunk) {
    constexpr T kInfinity = __builtin_inf();
    store(x1, splat(kInfinity));
    store(y1, splat(kInfinity));
    store(x2, splat(-kInfinity));
    store(y2, splat(-kInfinity));
    store(area, splat(T(0)));
    next = next_chunk;
    count = 0;
  }

  void push(const Box<T>& box) {
    x1[count] = box.x1;
    y1[count] = box.y1;
    x2[count] = box.x2;
    y2[count] = box.y2;
    area[count++] = box.area;
  }
};

// b where a < b, else a: std::max and std::min, NaN included.
PVK_INLINE Vec<float> max_vec(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(b, a);
#elif defined(__AVX2__)
  return _mm256_max_ps(b, a);
#else
  return a < b ? b : a;
#endif
}
PVK_INLINE Vec<float> min_vec(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(b, a);
#elif defined(__AVX2__)
  return _mm256_min_ps(b, a);
#else
  return b < a ? b : a;
#endif
}
PVK_INLINE Vec<double> max_vec(Vec<double> a, Vec<double> b) {
  return a < b ? b : a;
}
PVK_INLINE Vec<double> min_vec(Vec<double> a, Vec<double> b) {
  return b < a ? b : a;
}

// T's largest value that is not above the threshold: `iou > threshold`, compared in double, is `iou >
// floor_to(threshold)`.
template <typename T>
T floor_to(double threshold) {
  T value = T(threshold);
  if (double(value) > threshold)
    value = sizeof(T) == 4 ? T(__builtin_nextafterf(float(value), -__builtin_inff())) : value;
  return value;
}

template <typename T>
struct Threshold {
  T exact;
  T surely_below;  // inter < surely_below * union implies inter / union <= exact

  explicit Threshold(double threshold) : exact(floor_to<T>(threshold)), surely_below(exact * T(1 - 1.0 / (1 << 20))) {}
};

// Whether a box of the chunk suppresses `box`. Threshold >= 0 (or NaN): without overlap the IoU is 0 or NaN.
template <typename T>
PVK_INLINE bool suppressed_by(const Chunk<T>& chunk, const Box<T>& box, const Threshold<T>& threshold) {
  const Vec<T> zero{};
  const Vec<T> w = min_vec(load(chunk.x2), splat(box.x2)) - max_vec(load(chunk.x1), splat(box.x1));
  const Vec<T> h = min_vec(load(chunk.y2), splat(box.y2)) - max_vec(load(chunk.y1), splat(box.y1));
  const Mask<T> overlap = (w > zero) & (h > zero);
  if (!any<T>(overlap)) return false;
  const Vec<T> inter = w * h;
  const Vec<T> joined = load(chunk.area) + splat(box.area) - inter;
  const Mask<T> below = (joined > zero) & (inter < joined * splat(threshold.surely_below));
  if (!any<T>(overlap & ~below)) return false;
  return any<T>(overlap & (inter / joined > splat(threshold.exact)));
}

// A negative threshold suppresses boxes that do not even touch: every pair is looked at.
template <typename T>
bool suppresses_any_threshold(const Box<T>& earlier, const Box<T>& box, double threshold) {
  const T w = max_of(T(0), min_of(earlier.x2, box.x2) - max_of(earlier.x1, box.x1));
  const T h = max_of(T(0), min_of(earlier.y2, box.y2) - max_of(earlier.y1, box.y1));
  const T inter = w * h;
  return double(inter / (earlier.area + box.area - inter)) > threshold;
}

}  // namespace pvk::nms::PVK_ISA
