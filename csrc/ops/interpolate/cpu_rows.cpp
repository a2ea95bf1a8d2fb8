// Resizing of planes on the CPU, and of channels_last maps with few channels: registers along rows.
//
// A task owns a band of target rows of a plane. Where a map grows, source rows are resized along themselves, each once
// into a ring, and then added; where it shrinks they are added first. Target rows of the same taps are copies.
#include "core/dispatch.h"
#include "core/parallel.h"
#include "ops/interpolate/cpu_columns.h"

namespace pvk::interpolate::PVK_ISA {
namespace {

constexpr int64_t kBandElements = 1 << 16;  // of the result, of a task
constexpr int64_t kAlong = 3;               // what a tap along a row costs, in taps across

template <typename scalar_t>
class PlaneResize {
  using T = opmath_t<scalar_t>;
  static constexpr int64_t kLane = kLanes<T>;

 public:
  explicit PlaneResize(const InterpolateParams& p)
      : p_(p),
        group_(p.channels_last ? p.C : 1),
        rows_(p.rows, p.backward),
        columns_(p.columns, p.backward),
        filter_(columns_, group_),
        width_(columns_.sources * group_),
        to_width_(columns_.targets * group_),
        pitch_(ceil_div(to_width_, kLane) * kLane),
        along_first_(goes_along_first(rows_, columns_, kAlong)) {}

  void run() const {
    const int64_t band = min_of(max_of<int64_t>(1, kBandElements / to_width_), rows_.targets);
    const int64_t bands = ceil_div(rows_.targets, band), planes = p_.N * (group_ == 1 ? p_.C : 1);
    parallel_for(planes * bands, max_of<int64_t>(1, kPiece / (band * to_width_)), [&](int64_t begin, int64_t end) {
      Buffer<T> row(width_ + RowFilter<T>::kSpare), ring(along_first_ ? rows_.span * pitch_ : 0);
      Buffer<const void*> taps(max_of<int64_t>(1, rows_.most));
      fill(row.data() + width_, RowFilter<T>::kSpare, T(0));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t plane = task / bands, first = task % bands * band;
        const int64_t n = group_ == 1 ? plane / p_.C : plane, c = group_ == 1 ? plane % p_.C : 0;
        const scalar_t* const from =
            static_cast<const scalar_t*>(p_.from) + n * p_.from_stride[0] + c * p_.from_stride[1];
        scalar_t* const to = static_cast<scalar_t*>(p_.to) + n * p_.to_stride[0] + c * p_.to_stride[1];
        const int64_t last = min_of(first + band, rows_.targets);
        if (along_first_) {
          along_then_across(from, to, first, last, row.data(), ring.data(), taps.data());
        } else {
          across_then_along(from, to, first, last, row.data(), taps.data());
        }
      }
    });
  }

 private:
  void along_then_across(const scalar_t* from, scalar_t* to, int64_t first, int64_t last, T* row, T* ring,
                         const void** pointers) const {
    const T** const taps = reinterpret_cast<const T**>(pointers);
    int64_t held[kMostRing];  // which row each slot of the ring has
    fill(held, rows_.span, int64_t(-1));
    for (int64_t target = first; target < last; ++target) {
      const int64_t begin = rows_.begin[target], count = rows_.count(target);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t y = rows_.index[begin + k], slot = y % rows_.span;
        T* const resized = ring + slot * pitch_;
        taps[k] = resized;
        if (held[slot] == y) continue;
        held[slot] = y;
        filter_.run(readable(from, y, row), resized);
      }
      add_rows(taps, &rows_.weight[begin], count, to_width_, to + target * p_.to_stride[2]);
    }
  }

  void across_then_along(const scalar_t* from, scalar_t* to, int64_t first, int64_t last, T* row,
                         const void** pointers) const {
    const scalar_t** const taps = reinterpret_cast<const scalar_t**>(pointers);
    for (int64_t target = first; target < last; ++target) {
      const int64_t begin = rows_.begin[target], count = rows_.count(target);
      scalar_t* const result = to + target * p_.to_stride[2];
      if (target > first && same_row(target)) {
        __builtin_memcpy(result, result - p_.to_stride[2], size_t(to_width_) * sizeof(scalar_t));
        continue;
      }
      for (int64_t k = 0; k < count; ++k) taps[k] = from + rows_.index[begin + k] * p_.from_stride[2];
      if (columns_.unchanged) {
        add_rows(taps, &rows_.weight[begin], count, width_, result);
        continue;
      }
      if (rows_.chooses && count == 1) {
        filter_.run(readable(from, rows_.index[begin], row), result);
        continue;
      }
      add_rows(taps, &rows_.weight[begin], count, width_, row);
      filter_.run(row, result);
    }
  }

  // Row y of a plane as the filter reads it, with what lies beyond its end: as it is, or a copy.
  PVK_INLINE const T* readable(const scalar_t* from, int64_t y, T* row) const {
    const int64_t place = y * p_.from_stride[2];
    if constexpr (sizeof(scalar_t) == sizeof(T)) {
      const int64_t end = (rows_.sources - 1) * p_.from_stride[2] + width_;
      if (p_.from_stride[2] >= 0 && place + width_ + RowFilter<T>::kSpare <= end) return from + place;
    }
    copy_row(from + place, width_, row);
    return row;
  }

  // Whether a target row is the one before.
  bool same_row(int64_t target) const {
    const int64_t count = rows_.count(target);
    if (!rows_.chooses || count != rows_.count(target - 1)) return false;
    return count == 0 || rows_.index[rows_.begin[target]] == rows_.index[rows_.begin[target - 1]];
  }

  const InterpolateParams& p_;
  int64_t group_;
  TapTable<T> rows_, columns_;
  RowFilter<T> filter_;
  int64_t width_, to_width_, pitch_;
  bool along_first_;
};

}  // namespace

void resize_rows(const InterpolateParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { PlaneResize<decltype(scalar)>(p).run(); });
}

}  // namespace pvk::interpolate::PVK_ISA
