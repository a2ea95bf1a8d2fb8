// NMS on the CPU: boxes in descending score, each against the boxes kept so far, kLanes at a time.
//
// A box that suppresses another has its centre nearby, so kept boxes are filed in a grid and a box looks into a few
// cells. Boxes that are not finite, or tiny or huge beyond the type's range, go to a list that every box looks at.
// The decision itself is torchvision's arithmetic, rounding for rounding.
#include "ops/nms/nms.h"

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/simd.h"

namespace pvk::nms {
namespace PVK_ISA {
namespace {

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

// Kept boxes, filed in a uniform grid by their centres.
//
// IoU > t implies that the IoU of the two x intervals is > t too, so that their centres are less than
// (1 - t) / (2 t) of either width apart; the same in y. A box therefore looks only into the cells around its centre.
template <typename T>
class Grid {
 public:
  Grid(const Box<T>* boxes, int64_t count, double threshold) : reach_(reach_of(threshold)) {
    double low_x = 0, low_y = 0, high_x = 0, high_y = 0;
    int64_t ordinary = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!is_ordinary(boxes[i])) continue;
      const double x = center(boxes[i].x1, boxes[i].x2), y = center(boxes[i].y1, boxes[i].y2);
      low_x = ordinary ? min_of(low_x, x) : x;
      low_y = ordinary ? min_of(low_y, y) : y;
      high_x = ordinary ? max_of(high_x, x) : x;
      high_y = ordinary ? max_of(high_y, y) : y;
      ++ordinary;
    }
    // Square cells of kBoxesPerCell boxes on average.
    const double width = max_of(high_x - low_x, 1e-3), height = max_of(high_y - low_y, 1e-3);
    const double side = __builtin_sqrt(width * height * kBoxesPerCell / double(max_of(ordinary, int64_t(1))));
    columns_ = int64_t(min_of(width / side + 1, double(count)));
    rows_ = int64_t(min_of(height / side + 1, double(ceil_div(count, columns_))));
    origin_x_ = low_x;
    origin_y_ = low_y;
    scale_x_ = double(columns_) / width;
    scale_y_ = double(rows_) / height;
    const int64_t full = ceil_div(count, int64_t(kLanes<T>));
    heads_.reserve(columns_ * rows_);
    for (int64_t i = 0; i < columns_ * rows_; ++i) heads_[i] = -1;
    chunks_.reserve(columns_ * rows_ + full);
    all_.reserve(full);
    odd_.reserve(full);
  }

  bool suppresses(const Box<T>& box, const Threshold<T>& threshold) const {
    if (!is_ordinary(box) || !(reach_ < 1e6)) return search(all_, all_chunks_, box, threshold);
    const double x = center(box.x1, box.x2), dx = reach_ * (double(box.x2) - double(box.x1));
    const double y = center(box.y1, box.y2), dy = reach_ * (double(box.y2) - double(box.y1));
    const int64_t column = column_of(x - dx), last_column = column_of(x + dx);
    const int64_t row = row_of(y - dy), last_row = row_of(y + dy);
    const int64_t cells = (last_row - row + 1) * (last_column - column + 1);
    if (cells > all_chunks_) return search(all_, all_chunks_, box, threshold);
    if (search(odd_, odd_chunks_, box, threshold)) return true;
    for (int64_t r = row; r <= last_row; ++r)
      for (int64_t c = column; c <= last_column; ++c)
        for (int64_t i = heads_[r * columns_ + c]; i >= 0; i = chunks_[i].next)
          if (suppressed_by(chunks_[i], box, threshold)) return true;
    return false;
  }

  void keep(const Box<T>& box) {
    // A finite box without area overlaps no other.
    if (is_finite_box(box) && !(box.x2 > box.x1 && box.y2 > box.y1)) return;
    append(all_, all_chunks_, box);
    if (!is_ordinary(box)) {
      append(odd_, odd_chunks_, box);
      return;
    }
    int64_t& head = heads_[row_of(center(box.y1, box.y2)) * columns_ + column_of(center(box.x1, box.x2))];
    if (head < 0 || chunks_[head].count == kLanes<T>) {
      chunks_[used_].clear(head);
      head = used_++;
    }
    chunks_[head].push(box);
  }

 private:
  static constexpr double kBoxesPerCell = 12;

  static bool is_finite_box(const Box<T>& box) {
    return is_finite(box.x1) && is_finite(box.y1) && is_finite(box.x2) && is_finite(box.y2);
  }
  // Near enough, and its area neither overflows nor underflows, so the IoU that is computed is the true one up to
  // rounding.
  static bool is_ordinary(const Box<T>& box) {
    constexpr T kFar = T(1e30);
    return box.x1 > -kFar && box.y1 > -kFar && box.x2 < kFar && box.y2 < kFar && box.x2 > box.x1 && box.y2 > box.y1 &&
           box.area > T(1e-30) && box.area < T(1e30);
  }

  // A little more than the bound, for the rounding of the IoU; NaN where the threshold is.
  static double reach_of(double threshold) {
    const double least = threshold * (1 - 1e-5);
    return max_of((1 - least) / (2 * least), 0.0) * 1.001 + 1e-4;
  }

  static double center(T low, T high) { return double(low) / 2 + double(high) / 2; }

  // Monotone in the place, so that a range of places is a range of cells.
  static int64_t cell(double place, double origin, double scale, int64_t cells) {
    return int64_t(min_of(max_of((place - origin) * scale, 0.0), double(cells - 1)));
  }
  int64_t column_of(double x) const { return cell(x, origin_x_, scale_x_, columns_); }
  int64_t row_of(double y) const { return cell(y, origin_y_, scale_y_, rows_); }

  static bool search(const Buffer<Chunk<T>>& list, int64_t count, const Box<T>& box, const Threshold<T>& threshold) {
    for (int64_t i = 0; i < count; ++i)
      if (suppressed_by(list[i], box, threshold)) return true;
    return false;
  }

  static void append(Buffer<Chunk<T>>& list, int64_t& count, const Box<T>& box) {
    if (count == 0 || list[count - 1].count == kLanes<T>) list[count++].clear(-1);
    list[count - 1].push(box);
  }

  double reach_;  // in widths of the box that searches
  int64_t columns_, rows_;
  double origin_x_, origin_y_, scale_x_, scale_y_;
  Buffer<int64_t> heads_;  // of each cell's chain of chunks, or -1
  Buffer<Chunk<T>> chunks_, all_, odd_;
  int64_t used_ = 0, all_chunks_ = 0, odd_chunks_ = 0;
};

// A negative threshold suppresses boxes that do not even touch: every pair is looked at.
template <typename T>
bool suppresses_any_threshold(const Box<T>& earlier, const Box<T>& box, double threshold) {
  const T w = max_of(T(0), min_of(earlier.x2, box.x2) - max_of(earlier.x1, box.x1));
  const T h = max_of(T(0), min_of(earlier.y2, box.y2) - max_of(earlier.y1, box.y1));
  const T inter = w * h;
  return double(inter / (earlier.area + box.area - inter)) > threshold;
}

template <typename scalar_t>
int64_t forward_typed(const NmsParams& p) {
  using T = opmath_t<scalar_t>;
  Buffer<Box<T>> boxes(p.N);
  const scalar_t* source = static_cast<const scalar_t*>(p.boxes);
  for (int64_t i = 0; i < p.N; ++i) {
    const scalar_t* box = source + p.order[i] * p.boxes_stride[0];
    const auto value = [&](int64_t column) { return T(to_float(box[column * p.boxes_stride[1]])); };
    boxes[i] = {value(0), value(1), value(2), value(3), (value(2) - value(0)) * (value(3) - value(1))};
  }
  int64_t kept = 0;
  if (p.iou_threshold < 0) {
    Buffer<int64_t> kept_at(p.N);
    for (int64_t i = 0; i < p.N; ++i) {
      bool suppressed = false;
      for (int64_t j = 0; j < kept && !suppressed; ++j)
        suppressed = suppresses_any_threshold(boxes[kept_at[j]], boxes[i], p.iou_threshold);
      if (suppressed) continue;
      kept_at[kept] = i;
      p.keep[kept++] = p.order[i];
    }
    return kept;
  }
  const Threshold<T> threshold(p.iou_threshold);
  Grid<T> grid(boxes.data(), p.N, p.iou_threshold);
  for (int64_t i = 0; i < p.N; ++i) {
    if (grid.suppresses(boxes[i], threshold)) continue;
    grid.keep(boxes[i]);
    p.keep[kept++] = p.order[i];
  }
  return kept;
}

}  // namespace

int64_t forward(const NmsParams& p) {
  int64_t kept = 0;
  dispatch_floating(p.dtype, [&](auto scalar) { kept = forward_typed<decltype(scalar)>(p); });
  return kept;
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(int64_t, forward, NmsParams)
#if defined(PVK_ISA_BASELINE)
int64_t scratch_bytes(int64_t, DType) {
  return 0;
}
#endif

}  // namespace pvk::nms
