// The parts of average pooling on the CPU, each a file of its own.
#pragma once

#include "core/buffer.h"
#include "core/pool_taps.h"
#include "ops/avg_pool2d/avg_pool2d.h"

namespace pvk::avg_pool2d::PVK_ISA {

using namespace pvk::PVK_ISA;

inline constexpr int64_t kPiece = 16384;  // elements of the map that a thread gets at least

// Planes, and channels_last maps with few channels: registers along rows.
void forward_rows(const AvgPool2dParams& p);
// Planes with wide or uneven windows.
void forward_windows(const AvgPool2dParams& p);
void backward_rows(const AvgPool2dParams& p);
void backward_planes(const AvgPool2dParams& p);
// channels_last: registers along channels.
void forward_channels(const AvgPool2dParams& p);
void backward_channels(const AvgPool2dParams& p);

// The whole map in one window, where rows follow each other, is one row.
PVK_INLINE AvgPool2dParams with_joined_rows(const AvgPool2dParams& given) {
  AvgPool2dParams p = given;
  make_plain(p.rows, p.columns);
  if (!covers_the_map(p.rows) || !covers_the_map(p.columns) ||
      p.map_stride[2] != p.columns.size * (p.channels_last ? p.C : 1))
    return p;
  p.columns = {p.rows.size * p.columns.size, 1, 0, 1, 0, 1};
  p.rows = {1, 1, 0, 1, 0, 1};
  return p;
}

// What the columns' part of the divisor is, for each element of an output row, in whole registers.
template <typename T>
PVK_INLINE void column_divisors(const AvgPool2dParams& p, int64_t group, int64_t pitch, T* divisors) {
  for (int64_t i = 0; i < pitch; ++i)
    divisors[i] = T(p.divisor_of(p.columns, false, min_of(i / group, p.columns.outputs - 1)));
}

}  // namespace pvk::avg_pool2d::PVK_ISA
