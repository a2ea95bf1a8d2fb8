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

// Writes dense rows, one behind the other. Past the caches go whole cache lines: where rows are not made of these, each
// row lies behind what is left of the one before, on its way.
template <typename scalar_t>
class RowWriter {
 public:
  static constexpr int64_t kMostHeld = 64 / int64_t(sizeof(scalar_t)) - 1;

  // lines: for a row and kMostHeld more elements.
  RowWriter(scalar_t* target, int64_t width, bool past, scalar_t* lines) : target_(target), lines_(lines), past_(past) {
    const int64_t above = int64_t(reinterpret_cast<uintptr_t>(target) % 64 / sizeof(scalar_t));
    gathers_ = past && (above != 0 || width % kLine != 0);
    before_ = gathers_ && above != 0 ? kLine - above : 0;
  }

  // write(place, past) writes `count` elements.
  template <typename Write>
  PVK_INLINE void write(int64_t count, const Write& write) {
    if (!gathers_) {
      write(target_, past_);
      target_ += count;
      return;
    }
    write(lines_ + held_, false);
    held_ += count;
    int64_t done = 0;
    if (before_ > 0) {  // up to the first whole line
      done = min_of(before_, held_);
      put(lines_, done);
      before_ -= done;
    }
    const int64_t whole = (held_ - done) / kLine * kLine;
    for (int64_t i = done; i < done + whole; i += kLine, target_ += kLine) stream_line(lines_ + i, target_);
    done += whole;
    held_ -= done;
    __builtin_memmove(lines_, lines_ + done, size_t(held_) * sizeof(scalar_t));
  }
  void finish() { put(lines_, held_); }

 private:
  static constexpr int64_t kLine = 64 / int64_t(sizeof(scalar_t));

  PVK_INLINE void put(const scalar_t* from, int64_t count) {
    __builtin_memcpy(target_, from, size_t(count) * sizeof(scalar_t));
    target_ += count;
  }

  scalar_t* target_;
  scalar_t* lines_;
  int64_t held_ = 0, before_ = 0;
  bool past_, gathers_;
};

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
        along_first_(goes_along_first(rows_, columns_, filter_.has_phases() ? 0 : kAlong)),
        past_(goes_past_caches(p.N * p.C * rows_.targets * columns_.targets * int64_t(sizeof(scalar_t)))) {
    while (ring_rows_ < rows_.span) ring_rows_ *= 2;
  }

  void run() const {
    const int64_t band = min_of(max_of<int64_t>(1, kBandElements / to_width_), rows_.targets);
    const int64_t bands = ceil_div(rows_.targets, band), planes = p_.N * (group_ == 1 ? p_.C : 1);
    parallel_for(planes * bands, max_of<int64_t>(1, kPiece / (band * to_width_)), [&](int64_t begin, int64_t end) {
      Buffer<T> row(width_ + RowFilter<T>::kSpare), ring((along_first_ ? ring_rows_ : 1) * pitch_);
      Buffer<scalar_t> lines(past_ ? to_width_ + RowWriter<scalar_t>::kMostHeld : 0);
      Buffer<const void*> taps(max_of<int64_t>(1, rows_.most));
      fill(row.data() + width_, RowFilter<T>::kSpare, T(0));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t plane = task / bands, first = task % bands * band;
        const int64_t n = group_ == 1 ? plane / p_.C : plane, c = group_ == 1 ? plane % p_.C : 0;
        const scalar_t* const from =
            static_cast<const scalar_t*>(p_.from) + n * p_.from_stride[0] + c * p_.from_stride[1];
        const int64_t last = min_of(first + band, rows_.targets);
        const RowWriter<scalar_t> to(
            static_cast<scalar_t*>(p_.to) + n * p_.to_stride[0] + c * p_.to_stride[1] + first * p_.to_stride[2],
            to_width_, past_, lines.data());
        if (along_first_) {
          along_then_across(from, to, first, last, row.data(), ring.data(), taps.data());
        } else {
          across_then_along(from, to, first, last, row.data(), ring.data(), taps.data());
        }
      }
      if (past_) end_of_streams();
    });
  }

 private:
  void along_then_across(const scalar_t* from, RowWriter<scalar_t> result, int64_t first, int64_t last, T* row, T* ring,
                         const void** pointers) const {
    const T** const taps = reinterpret_cast<const T**>(pointers);
    const int64_t bytes = width_ * int64_t(sizeof(scalar_t)), ahead = ceil_div(kBytesAhead, bytes);
    const int64_t asked = min_of(bytes, kBytesAhead);
    int64_t held[kMostRing];  // which row each slot of the ring has
    fill(held, ring_rows_, int64_t(-1));
    for (int64_t target = first; target < last; ++target) {
      const int64_t begin = rows_.begin[target], count = rows_.count(target);
      for (int64_t k = 0; k < count; ++k) {
        const int64_t y = rows_.index[begin + k], slot = y & (ring_rows_ - 1);
        T* const resized = ring + slot * pitch_;
        taps[k] = resized;
        if (held[slot] == y) continue;
        held[slot] = y;
        const char* const soon =
            reinterpret_cast<const char*>(from + min_of(y + ahead, rows_.sources - 1) * p_.from_stride[2]);
        for (int64_t byte = 0; byte < asked; byte += 64) __builtin_prefetch(soon + byte);
        filter_.run(readable(from, y, row), resized);
      }
      result.write(to_width_, [&](scalar_t* place, bool past) __attribute__((always_inline)) {
        add_rows(taps, &rows_.weight[begin], count, to_width_, place, past);
      });
    }
    result.finish();
  }

  void across_then_along(const scalar_t* from, RowWriter<scalar_t> result, int64_t first, int64_t last, T* row,
                         T* resized, const void** pointers) const {
    const scalar_t** const taps = reinterpret_cast<const scalar_t**>(pointers);
    const int64_t ahead = ceil_div(kBytesAhead, width_ * int64_t(sizeof(scalar_t)));
    for (int64_t target = first; target < last; ++target) {
      const int64_t begin = rows_.begin[target], count = rows_.count(target);
      for (int64_t k = 0; k < count; ++k) taps[k] = from + rows_.index[begin + k] * p_.from_stride[2];
      const auto next = rows_of_next(rows_, target + ahead, from, p_.from_stride[2]);
      if (columns_.unchanged) {
        result.write(to_width_, [&](scalar_t* place, bool past) __attribute__((always_inline)) {
          add_rows(taps, &rows_.weight[begin], count, width_, place, past, next);
        });
        continue;
      }
      if (target == first || !same_row(target)) {
        const T* whole = row;
        if (rows_.chooses && count == 1) {
          whole = readable(from, rows_.index[begin], row);
        } else {
          add_rows(taps, &rows_.weight[begin], count, width_, row, false, next);
        }
        filter_.run(whole, resized);
      }
      result.write(to_width_, [&](scalar_t* place, bool past) __attribute__((always_inline)) {
        copy_row(static_cast<const T*>(resized), to_width_, place, past);
      });
    }
    result.finish();
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
  int64_t width_, to_width_, pitch_, ring_rows_ = 1;  // a power of two
  bool along_first_, past_;
};

}  // namespace

void resize_rows(const InterpolateParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { PlaneResize<decltype(scalar)>(p).run(); });
}

}  // namespace pvk::interpolate::PVK_ISA
