// Groups of few channels: a register of channels holds several groups, and each output lane multiplies the channels of
// its own group, brought to it by shuffles of the register. Weights are [register of outputs][tap][channel][lane].
#pragma once

#include "core/gemm_tile.h"
#include "core/simd.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// As many channels out as in, whole groups in a register, and whole registers.
template <typename T>
PVK_INLINE bool shuffles_groups(int64_t channels, int64_t outputs, int64_t groups) {
  return sizeof(T) == 4 && (channels == 4 || channels == 8) && channels < kLanes<T> && channels == outputs &&
         channels * groups % kLanes<T> == 0;
}

// order[lane]: channel j of the lane's group.
template <typename T, int kGroup>
PVK_INLINE Mask<T> lane_order(int j) {
  Mask<T> order{};
  for (int lane = 0; lane < kLanes<T>; ++lane) order[lane] = lane / kGroup * kGroup + j;
  return order;
}

// zeros: taps that point there are left out, of tiles of one row; or null.
template <int kGroup, typename T, int kRows>
PVK_INLINE void multiply_groups(Tile<T, kRows, 1>& tile, const GemmBlock<T>& b, int64_t row, const T* zeros) {
  for (int64_t tap = 0; tap < b.taps; ++tap) {
    const T* const* const rows = b.rows + tap * b.row_pitch + row;
    if (kRows == 1 && zeros != nullptr && rows[0] == zeros) continue;
    Vec<T> value[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) value[i] = load(rows[i] + b.first);
#pragma GCC unroll 8
    for (int j = 0; j < kGroup; ++j) {
      const Vec<T> weight = load(b.panel + (tap * kGroup + j) * kLanes<T>);
      const Mask<T> order = lane_order<T, kGroup>(j);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) tile.sum[i][0] = fma(__builtin_shuffle(value[i], order), weight, tile.sum[i][0]);
    }
  }
}

// gemm_block() for groups of kGroup channels.
template <int kGroup, typename T>
void gemm_groups(const GemmBlock<T>& b, const T* zeros) {
  constexpr int kMax = kRegisterBytes == 64 ? 12 : kRegisterBytes == 32 ? 6 : 4;
  const int64_t tiles = zeros != nullptr ? b.count : ceil_div<int64_t>(b.count, kMax);
  int64_t row = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int count = int(ceil_div<int64_t>(b.count - row, tiles - tile));
    with_rows<kMax>(count, [&](auto rows) __attribute__((always_inline)) {
      Tile<T, decltype(rows)::value, 1> sums;
      if (b.finish != nullptr) sums.prefetch(*b.finish, row);
      sums.clear();
      multiply_groups<kGroup>(sums, b, row, zeros);
      if (b.finish != nullptr) return sums.finish(*b.finish, row);
      sums.store(b.sums + row * b.pitch, b.pitch);
    });
    row += count;
  }
}

}  // namespace pvk::conv2d::PVK_ISA
