// The parts of resizing on the CPU: tables of taps, sums of rows, and the kernels of the two layouts.
#pragma once

#include "core/buffer.h"
#include "core/pool_rows.h"
#include "core/stream.h"
#include "ops/interpolate/interpolate.h"

namespace pvk::interpolate::PVK_ISA {

using namespace pvk::PVK_ISA;

inline constexpr int64_t kBytesAhead = 4096;  // that a row's reading is ahead
inline constexpr int64_t kPiece = 16384;      // elements of the result that a thread gets at least

// Planes, and channels_last maps with few channels: registers along rows.
void resize_rows(const InterpolateParams& p);
// channels_last: registers along channels.
void resize_channels(const InterpolateParams& p);

// Of an axis: which sources each target adds, in their order, and by what weight. Targets are the outputs; in the
// gradient the pixels, and sources the outputs that read them.
template <typename T>
struct TapTable {
  int64_t sources, targets;
  int64_t most = 0;       // taps of a target
  int64_t span = 1;       // sources from a target's first tap to its last
  bool chooses = true;    // a target is one source as it is, or nothing
  bool unchanged = true;  // target i is source i
  Buffer<int64_t> begin, index;
  Buffer<T> weight;

  TapTable(const ResizeAxis& axis, bool backward)
      : sources(backward ? axis.outputs : axis.size), targets(backward ? axis.size : axis.outputs) {
    const int64_t taps = axis.outputs * axis.most_taps<T>();
    begin.reserve(targets + 1);
    index.reserve(taps);
    weight.reserve(taps);
    if (backward) {
      gather_outputs(axis);
    } else {
      list_pixels(axis, begin, index, weight);
    }
    for (int64_t i = 0; i < targets; ++i) describe(i);
    unchanged = unchanged && chooses && sources == targets;
  }

  int64_t count(int64_t target) const { return begin[target + 1] - begin[target]; }

 private:
  static void list_pixels(const ResizeAxis& axis, Buffer<int64_t>& from, Buffer<int64_t>& pixels, Buffer<T>& weights) {
    int64_t place = 0;
    for (int64_t o = 0; o < axis.outputs; ++o) {
      int64_t start = 0, count = 0;
      axis.taps(o, start, count, &weights[place]);
      from[o] = place;
      for (int64_t k = 0; k < count; ++k) pixels[place + k] = axis.pixel(start, k);
      place += count;
    }
    from[axis.outputs] = place;
  }

  void gather_outputs(const ResizeAxis& axis) {
    const int64_t taps = axis.outputs * axis.most_taps<T>();
    Buffer<int64_t> from(axis.outputs + 1), pixels(taps);
    Buffer<T> weights(taps);
    list_pixels(axis, from, pixels, weights);
    fill(begin.data(), targets + 1, int64_t(0));
    for (int64_t i = 0; i < from[axis.outputs]; ++i) ++begin[pixels[i] + 1];
    for (int64_t i = 0; i < targets; ++i) begin[i + 1] += begin[i];
    for (int64_t o = 0; o < axis.outputs; ++o)
      for (int64_t i = from[o]; i < from[o + 1]; ++i) {
        const int64_t place = begin[pixels[i]]++;
        index[place] = o;
        weight[place] = weights[i];
      }
    for (int64_t i = targets; i > 0; --i) begin[i] = begin[i - 1];
    begin[0] = 0;
  }

  void describe(int64_t i) {
    most = max_of(most, count(i));
    chooses = chooses && count(i) <= 1;
    unchanged = unchanged && count(i) == 1 && index[begin[i]] == i;
    for (int64_t k = begin[i]; k < begin[i + 1]; ++k) {
      span = max_of(span, index[k] - index[begin[i]] + 1);
      chooses = chooses && weight[k] == T(1);
    }
  }
};

// Rows that are read soon: what is summed from several rows at once, the hardware does not foresee.
template <typename from_t>
struct NextRows {
  static constexpr int64_t kMost = 8;
  const from_t* row[kMost];
  int64_t count = 0;

  PVK_INLINE void add(const from_t* next) {
    if (count < kMost) row[count++] = next;
  }
  // Elements i to i + elements.
  PVK_INLINE void prefetch(int64_t i, int64_t elements) const {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = i; j < i + elements; j += 64 / int64_t(sizeof(from_t))) __builtin_prefetch(row[k] + j);
  }
};

// to[i] = the sum over k of weights[k] * rows[k][i], i below count; kRows of them, 0: `n`.
template <int kRows, typename from_t, typename to_t, typename T>
PVK_INLINE void add_some_rows(const from_t* const* rows, const T* weights, int64_t n, int64_t count, to_t* to,
                              bool past, const NextRows<from_t>& next) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t taps = kRows > 0 ? kRows : n;
  write_registers(to, count, past, [&](int64_t i, int lanes, auto& sum) __attribute__((always_inline)) {
    constexpr int kVectors = int(sizeof(sum) / sizeof(sum[0]));
    next.prefetch(i, kVectors * kLane);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = load_lanes(rows[0] + i + v * kLane, lanes) * splat(weights[0]);
#pragma GCC unroll 4
    for (int64_t k = 1; k < taps; ++k) {
      const Vec<T> weight = splat(weights[k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] = fma(load_lanes(rows[k] + i + v * kLane, lanes), weight, sum[v]);
    }
  });
}

template <typename from_t, typename to_t>
PVK_INLINE void copy_row(const from_t* from, int64_t count, to_t* to, bool past = false) {
  write_registers(to, count, past, [&](int64_t i, int lanes, auto& value) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < int(sizeof(value) / sizeof(value[0])); ++v)
      value[v] = load_lanes(from + i + v * kLanes<opmath_t<to_t>>, lanes);
  });
}
template <>
PVK_INLINE void copy_row(const BFloat16* from, int64_t count, BFloat16* to, bool) {
  __builtin_memcpy(to, from, size_t(count) * sizeof(BFloat16));
}
template <>
PVK_INLINE void copy_row(const Float16* from, int64_t count, Float16* to, bool) {
  __builtin_memcpy(to, from, size_t(count) * sizeof(Float16));
}

template <typename from_t, typename to_t, typename T>
PVK_INLINE void add_rows(const from_t* const* rows, const T* weights, int64_t n, int64_t count, to_t* to,
                         bool past = false, const NextRows<from_t>& next = {}) {
  switch (n) {
    case 0:
      for (int64_t i = 0; i < count; ++i) to[i] = to_t{};
      return;
    case 1:
      if (weights[0] == T(1)) return copy_row(rows[0], count, to, past);
      break;
    case 2:
      return add_some_rows<2>(rows, weights, n, count, to, past, next);
    case 4:
      return add_some_rows<4>(rows, weights, n, count, to, past, next);
    default:
      break;
  }
  add_some_rows<0>(rows, weights, n, count, to, past, next);
}

// The rows that a target adds and the one before it does not.
template <typename from_t, typename T>
PVK_INLINE NextRows<from_t> rows_of_next(const TapTable<T>& rows, int64_t target, const from_t* first, int64_t stride) {
  NextRows<from_t> next;
  if (target >= rows.targets || target < 1) return next;
  const int64_t begin = rows.begin[target];
  const int64_t known = begin > rows.begin[target - 1] ? rows.index[begin - 1] : -1;
  for (int64_t k = begin; k < rows.begin[target + 1]; ++k)
    if (rows.index[k] > known) next.add(first + rows.index[k] * stride);
  return next;
}

// Rows that were resized along themselves are kept in a ring; this many at most.
inline constexpr int64_t kMostRing = 16;

// Whether rows are resized along themselves before they are added: by the multiply-adds of either order, of which one
// along a row costs as much as `along` of those across.
template <typename T>
PVK_INLINE bool goes_along_first(const TapTable<T>& rows, const TapTable<T>& columns, int64_t along) {
  if (rows.chooses || rows.span > kMostRing || columns.unchanged) return false;
  const double row_taps = double(rows.begin[rows.targets]), column_taps = double(columns.begin[columns.targets]);
  const double read = double(min_of(rows.begin[rows.targets], rows.sources));
  return read * column_taps * double(along) + row_taps * double(columns.targets) <
         row_taps * double(columns.sources) + double(rows.targets) * column_taps * double(along);
}

}  // namespace pvk::interpolate::PVK_ISA
