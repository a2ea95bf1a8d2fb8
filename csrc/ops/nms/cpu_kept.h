// Kept boxes on the CPU, filed by group, and in large groups by their centres in a uniform grid.
//
// A box that suppresses another has its centre nearby, so a box looks into a few cells. Boxes that are not finite, or
// tiny or huge beyond the type's range, go to a chain that every box of the group looks at.
#pragma once

#include "core/buffer.h"
#include "core/math.h"
#include "ops/nms/cpu_iou.h"

namespace pvk::nms::PVK_ISA {

// The kept boxes of one group, in chains of chunks, each led by its newest.
struct Field {
  int64_t awaited = 0;  // boxes of the group that are still to come
  int64_t ordinary = 0;
  int64_t columns = 0, rows = 0;  // 0: no grid
  int64_t first_cell = 0;
  int64_t all = -1, odd = -1;  // every kept box; those that no cell holds
  int64_t chunks = 0;          // in the chain `all`
  double low_x, low_y, high_x, high_y;
  double scale_x, scale_y;  // cells for a unit of length
};

// IoU > t implies that the IoU of the two x intervals is > t too, so that their centres are less than
// (1 - t) / (2 t) of either width apart; the same in y.
template <typename T>
class KeptBoxes {
 public:
  // Forgets all. `awaited` of every field says how many boxes it will get.
  void start(Buffer<Field>& fields, int64_t groups, const Box<T>* boxes, const int64_t* group_of, int64_t count,
             double threshold) {
    // A little more than the bound, for the rounding of the IoU; NaN where the threshold is. Added to 0, -0 is 0.
    const double least = 0.0 + threshold * (1 - 1e-5);
    reach_ = max_of((1 - least) / (2 * least), 0.0) * 1.001 + 1e-4;
    used_ = 0;
    int64_t chunks = 0, cells = 0;
    bool gridded = false;
    for (int64_t g = 0; g < groups; ++g) {
      chunks += ceil_div(fields[g].awaited - 1, int64_t(kLanes<T>));  // the last is not filed
      gridded |= wants_grid(fields[g]);
    }
    if (gridded) {
      for (int64_t i = 0; i < count; ++i) {
        Field& field = fields[group_of != nullptr ? group_of[i] : 0];
        if (wants_grid(field) && is_ordinary(boxes[i])) measure(field, boxes[i]);
      }
      for (int64_t g = 0; g < groups; ++g) {
        if (!wants_grid(fields[g])) continue;
        lay_out(fields[g], cells);
        cells = fields[g].first_cell + fields[g].columns * fields[g].rows;
        chunks += 2 * ceil_div(fields[g].awaited, int64_t(kLanes<T>));
      }
    }
    heads_.reserve(cells);
    for (int64_t i = 0; i < cells; ++i) heads_[i] = -1;
    chunks_.reserve(chunks + cells);
  }

  bool suppresses(const Field& field, const Box<T>& box, const Threshold<T>& threshold) const {
    if (field.columns == 0 || !is_ordinary(box) || !(reach_ < 1e6)) return search(field.all, box, threshold);
    const double x = center(box.x1, box.x2), dx = reach_ * (double(box.x2) - double(box.x1));
    const double y = center(box.y1, box.y2), dy = reach_ * (double(box.y2) - double(box.y1));
    const int64_t column = column_of(field, x - dx), last_column = column_of(field, x + dx);
    const int64_t row = row_of(field, y - dy), last_row = row_of(field, y + dy);
    const int64_t cells = (last_row - row + 1) * (last_column - column + 1);
    if (cells > field.chunks) return search(field.all, box, threshold);
    if (search(field.odd, box, threshold)) return true;
    for (int64_t r = row; r <= last_row; ++r)
      for (int64_t c = column; c <= last_column; ++c)
        if (search(heads_[field.first_cell + r * field.columns + c], box, threshold)) return true;
    return false;
  }

  void keep(Field& field, const Box<T>& box) {
    // A finite box without area overlaps no other.
    if (is_finite_box(box) && !(box.x2 > box.x1 && box.y2 > box.y1)) return;
    if (append(field.all, box)) ++field.chunks;
    if (field.columns == 0) return;
    if (!is_ordinary(box)) {
      append(field.odd, box);
      return;
    }
    const int64_t row = row_of(field, center(box.y1, box.y2)), column = column_of(field, center(box.x1, box.x2));
    append(heads_[field.first_cell + row * field.columns + column], box);
  }

 private:
  static constexpr double kBoxesPerCell = 12;
  static constexpr int64_t kManyBoxes = 4 * kLanes<T>;  // fewer are all looked at

  static bool wants_grid(const Field& field) { return field.awaited > kManyBoxes; }

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

  static double center(T low, T high) { return double(low) / 2 + double(high) / 2; }

  static void measure(Field& field, const Box<T>& box) {
    const double x = center(box.x1, box.x2), y = center(box.y1, box.y2);
    const bool first = field.ordinary++ == 0;
    field.low_x = first ? x : min_of(field.low_x, x);
    field.low_y = first ? y : min_of(field.low_y, y);
    field.high_x = first ? x : max_of(field.high_x, x);
    field.high_y = first ? y : max_of(field.high_y, y);
  }

  // Square cells of kBoxesPerCell boxes on average.
  static void lay_out(Field& field, int64_t first_cell) {
    if (field.ordinary == 0) field.low_x = field.low_y = field.high_x = field.high_y = 0;
    const double width = max_of(field.high_x - field.low_x, 1e-3), height = max_of(field.high_y - field.low_y, 1e-3);
    const double per_cell = kBoxesPerCell / double(max_of(field.ordinary, int64_t(1)));
    const double side = __builtin_sqrt(width * height * per_cell);
    field.columns = int64_t(min_of(width / side + 1, double(field.awaited)));
    field.rows = int64_t(min_of(height / side + 1, double(ceil_div(field.awaited, field.columns))));
    field.scale_x = double(field.columns) / width;
    field.scale_y = double(field.rows) / height;
    field.first_cell = first_cell;
  }

  // Monotone in the place, so that a range of places is a range of cells.
  static int64_t cell(double place, double origin, double scale, int64_t cells) {
    return int64_t(min_of(max_of((place - origin) * scale, 0.0), double(cells - 1)));
  }
  static int64_t column_of(const Field& field, double x) { return cell(x, field.low_x, field.scale_x, field.columns); }
  static int64_t row_of(const Field& field, double y) { return cell(y, field.low_y, field.scale_y, field.rows); }

  PVK_INLINE bool search(int64_t chain, const Box<T>& box, const Threshold<T>& threshold) const {
    for (; chain >= 0; chain = chunks_[chain].next)
      if (suppressed_by(chunks_[chain], box, threshold)) return true;
    return false;
  }

  // Whether that took a new chunk.
  bool append(int64_t& head, const Box<T>& box) {
    const bool full = head < 0 || chunks_[head].count == kLanes<T>;
    if (full) {
      chunks_[used_].clear(head);
      head = used_++;
    }
    chunks_[head].push(box);
    return full;
  }

  double reach_;           // in widths of the box that searches
  Buffer<int64_t> heads_;  // of each cell's chain, or -1
  Buffer<Chunk<T>> chunks_;
  int64_t used_ = 0;
};

}  // namespace pvk::nms::PVK_ISA
