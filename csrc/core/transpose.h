// Tiles between memory and a lane-major buffer: tile[item][lane], `pitch` elements an item.
//
// Whole kLanes x kLanes squares go through registers; edges and odd strides go one by one.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace pvk::PVK_ISA {

template <typename T>
struct TransposeMasks {  // interleave the low halves, the high halves, of two vectors
  Mask<T> low, high;
  constexpr TransposeMasks() : low{}, high{} {
    constexpr int lanes = kLanes<T>;
    for (int i = 0; i < lanes; ++i) {
      low[i] = i / 2 + (i % 2) * lanes;
      high[i] = lanes / 2 + i / 2 + (i % 2) * lanes;
    }
  }
};

// rows[i][j] <-> rows[j][i]: log2(lanes) rounds of the perfect shuffle.
template <typename T>
PVK_INLINE void transpose_square(Vec<T>* rows) {
  constexpr int lanes = kLanes<T>;
  const TransposeMasks<T> masks;
#pragma GCC unroll 8
  for (int round = 1; round < lanes; round *= 2) {
    Vec<T> next[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + lanes / 2], masks.low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + lanes / 2], masks.high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// tile[item][lane] = source[lane * lane_stride + item * item_stride], converted; lanes from `lanes` to the next
// multiple of kLanes are zeros.
template <typename scalar_t, typename T>
PVK_INLINE void load_tile(T* tile, int64_t pitch, const scalar_t* source, int64_t lane_stride, int64_t item_stride,
                          int64_t lanes, int64_t items) {
  constexpr int kSide = kLanes<T>;
  for (int64_t lane = 0; lane < lanes; lane += kSide) {
    const scalar_t* from = source + lane * lane_stride;
    T* to = tile + lane;
    const bool whole = lanes - lane >= kSide;
    if (whole && lane_stride == 1) {
      for (int64_t item = 0; item < items; ++item) store(to + item * pitch, load(from + item * item_stride));
    } else if (whole && item_stride == 1 && items >= kSide) {
      for (int64_t item = 0; item < items; item += kSide) {
        const int64_t first = item < items - kSide ? item : items - kSide;  // the last square overlaps
        Vec<T> rows[kSide];
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) rows[i] = load(from + i * lane_stride + first);
        transpose_square<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) store(to + (first + i) * pitch, rows[i]);
      }
    } else {
      for (int64_t item = 0; item < items; ++item)
        for (int i = 0; i < kSide; ++i)
          to[item * pitch + i] = lane + i < lanes ? T(to_float(from[i * lane_stride + item * item_stride])) : T(0);
    }
  }
}

// target[lane * lane_stride + item * item_stride] = tile[item][lane], converted; only the first `lanes` lanes.
template <typename scalar_t, typename T>
PVK_INLINE void store_tile(scalar_t* target, const T* tile, int64_t pitch, int64_t lane_stride, int64_t item_stride,
                           int64_t lanes, int64_t items) {
  constexpr int kSide = kLanes<T>;
  for (int64_t lane = 0; lane < lanes; lane += kSide) {
    scalar_t* to = target + lane * lane_stride;
    const T* from = tile + lane;
    const bool whole = lanes - lane >= kSide;
    if (whole && lane_stride == 1) {
      for (int64_t item = 0; item < items; ++item) store(to + item * item_stride, load(from + item * pitch));
    } else if (whole && item_stride == 1 && items >= kSide) {
      for (int64_t item = 0; item < items; item += kSide) {
        const int64_t first = item < items - kSide ? item : items - kSide;
        Vec<T> rows[kSide];
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) rows[i] = load(from + (first + i) * pitch);
        transpose_square<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) store(to + i * lane_stride + first, rows[i]);
      }
    } else {
      for (int64_t item = 0; item < items; ++item)
        for (int i = 0; i < kSide && lane + i < lanes; ++i)
          to[i * lane_stride + item * item_stride] = from_float<scalar_t>(from[item * pitch + i]);
    }
  }
}

}  // namespace pvk::PVK_ISA
