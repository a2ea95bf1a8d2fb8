// Batch normalisation on the CPU: how maps are cut into pieces, and vectors of channels.
//
// A map is planes, one of each channel and image; or rows, in which the channels of neighbouring pixels lie side by
// side. The borders of pieces depend on sizes alone, so that the number of threads changes no bit.
#pragma once

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/moments.h"
#include "core/parallel.h"
#include "core/simd_pair.h"
#include "ops/batch_norm/batch_norm.h"

namespace pvk::batch_norm {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// So many elements go to a lane's sum in T, which then goes to one in double: shorter chains of rounding.
constexpr int64_t kPairsOfSum = 8, kRowsOfSum = 8;
constexpr int64_t kChannelsOfBlock = 32, kBytesOfBlock = 1 << 19;  // of planes, finished while in the L2 cache
constexpr int64_t kElementsOfRows = 16384;                         // of a piece of rows
constexpr int64_t kLeastWidth = 256, kMostWidth = 8192;            // of rows of several pixels

// The vector in T, or `otherwise` in all places where there is none.
template <typename T>
void fill(T* target, const void* vector, DType dtype, int64_t count, T otherwise) {
  if (vector == nullptr) {
    for (int64_t i = 0; i < count; ++i) target[i] = otherwise;
    return;
  }
  dispatch_floating(dtype, [&](auto scalar) {
    const auto* const source = static_cast<const decltype(scalar)*>(vector);
    for (int64_t i = 0; i < count; ++i) target[i] = T(to_float(source[i]));
  });
}

// Adds a register's lanes to sums in double.
template <typename T>
PVK_INLINE void add_wide(double* target, Vec<T> value) {
  WideSum<T> sum;
  constexpr int kSide = kLanes<double>;
  sum.low = load(target);
  if constexpr (sizeof(T) == 4) sum.high = load(target + kSide);
  sum.add(value);
  store(target, sum.low);
  if constexpr (sizeof(T) == 4) store(target + kSide, sum.high);
}

// ---- planes ----

// Calls body(first channel, channels) for blocks whose planes of all images stay in the cache.
template <typename Body>
void for_blocks_of_channels(int64_t C, int64_t bytes_of_channel, const Body& body) {
  const int64_t block = max_of(min_of(kBytesOfBlock / bytes_of_channel, kChannelsOfBlock), int64_t(1));
  parallel_for(C, block, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += block) body(c, min_of(block, end - c));
  });
}

// ---- rows ----

// Pixels are taken several at a time, as rows of `width` that are whole pairs of registers where that can be.
struct Rows {
  int64_t C, width, count, rest;  // rest: elements behind the last whole row
  int64_t pitch;                  // width, up to whole pairs

  int64_t elements() const { return count * width + rest; }
};

template <typename scalar_t>
Rows rows_of(int64_t pixels, int64_t C) {
  constexpr int64_t kWhole = kPair<scalar_t>;
  int64_t pixels_of_row = kWhole;
  while (pixels_of_row > 1 && pixels_of_row / 2 * C % kWhole == 0) pixels_of_row /= 2;
  while (pixels_of_row * C < kLeastWidth) pixels_of_row *= 2;
  if (pixels_of_row * C > kMostWidth || pixels < 4 * pixels_of_row) pixels_of_row = 1;
  const int64_t width = pixels_of_row * C, count = pixels / pixels_of_row;
  return {C, width, count, (pixels - count * pixels_of_row) * C, ceil_div(width, kWhole) * kWhole};
}

// A vector of channels in the places that these have in the pairs of a row.
template <typename scalar_t>
void spread(const Rows& rows, const opmath_t<scalar_t>* vector, opmath_t<scalar_t>* target) {
  for (int64_t i = rows.width; i < rows.pitch; ++i) target[place_in_pairs<scalar_t>(i)] = 0;
  for (int64_t first = 0; first < rows.width; first += rows.C)
    for (int64_t c = 0; c < rows.C; ++c) target[place_in_pairs<scalar_t>(first + c)] = vector[c];
}

// The cache is told of what a walk along rows comes to next: without that, the hardware follows neither a walk that
// also reads vectors of channels nor one along several rows at once.
template <typename scalar_t>
PVK_INLINE void prefetch_ahead(const scalar_t* source) {
  constexpr int kAhead = 4096;
#pragma GCC unroll 4
  for (int byte = 0; byte < kPair<scalar_t> * int(sizeof(scalar_t)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAhead + byte, 0, 2);
}

// The same of the kRowsOfSum rows after those that are walked along together: a share of them at each place.
template <typename scalar_t>
PVK_INLINE void prefetch_rows(const Rows& rows, const scalar_t* map, int64_t offset, int64_t place) {
  const char* const next = reinterpret_cast<const char*>(map + offset - place + kRowsOfSum * (rows.width + place));
#pragma GCC unroll 32
  for (int64_t line = 0; line < kRowsOfSum * kPair<scalar_t> * int64_t(sizeof(scalar_t)) / 64; ++line)
    __builtin_prefetch(next + 64 * line, 0, 2);
}

// sums, [2, C], of what add(offset, rows, place, elements, one, other) adds to two pairs: `elements` of each of so many
// rows from the offset on, which lie in the row's pairs from the place on.
template <typename scalar_t, typename Add>
void sums_of_rows(const Rows& rows, double* sums, const Add& add) {
  using T = opmath_t<scalar_t>;
  const int64_t parts = min_of(parts_of(rows.elements(), 1), max_of(rows.count, int64_t(1)));
  Buffer<double> partials(parts * 2 * rows.pitch);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      double *const one = partials.data() + part * 2 * rows.pitch, *const other = one + rows.pitch;
      for (int64_t i = 0; i < 2 * rows.pitch; ++i) one[i] = 0;
      const auto group = [&](int64_t offset, int64_t count, int64_t width) __attribute__((always_inline)) {
        for_pairs<scalar_t>(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
          Pair<T> first, second;
          add(offset + i, count, i, n, first, second);
          add_wide<T>(one + i, first.first);
          add_wide<T>(one + i + kLanes<T>, first.second);
          add_wide<T>(other + i, second.first);
          add_wide<T>(other + i + kLanes<T>, second.second);
        });
      };
      const int64_t last = rows.count * (part + 1) / parts;
      for (int64_t row = rows.count * part / parts; row < last; row += kRowsOfSum)
        group(row * rows.width, min_of(kRowsOfSum, last - row), rows.width);
      if (part == parts - 1 && rows.rest > 0) group(rows.count * rows.width, 1, rows.rest);
    }
  });
  double* const totals = partials.data();
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < 2 * rows.pitch; ++i) totals[i] += partials[part * 2 * rows.pitch + i];
  for (int64_t c = 0; c < 2 * rows.C; ++c) sums[c] = 0;
  for (int which = 0; which < 2; ++which)
    for (int64_t first = 0; first < rows.width; first += rows.C)
      for (int64_t c = 0; c < rows.C; ++c)
        sums[which * rows.C + c] += totals[which * rows.pitch + place_in_pairs<scalar_t>(first + c)];
}

// Calls body(offset, elements) for rows. Where a walk along all of them went before, the last ones come first, which
// the cache may still hold; `past`: body streams.
template <typename Body>
void for_rows(const Rows& rows, bool again, bool past, const Body& body) {
  const int64_t all = rows.count + (rows.rest > 0);
  const int64_t piece = max_of(kElementsOfRows / rows.width, int64_t(1)), pieces = ceil_div(all, piece);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (again ? pieces - 1 - i : i) * piece, last = min_of(first + piece, all);
      for (int64_t row = first; row < last; ++row) body(row * rows.width, row < rows.count ? rows.width : rows.rest);
    }
    if (past) end_of_streams();
  });
}

}  // namespace
}  // namespace PVK_ISA
}  // namespace pvk::batch_norm
