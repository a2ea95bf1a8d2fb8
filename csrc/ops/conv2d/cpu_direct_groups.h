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
#if defined(__AVX512F__)
  const bool fits = channels == 4 || channels == 8;
#elif defined(__AVX2__)
  const bool fits = channels == 4;
#else
  const bool fits = false;
#endif
  return sizeof(T) == 4 && fits && channels == outputs && channels * groups % kLanes<T> == 0;
}

#if defined(__AVX2__)

// Channel j of each four lanes, in all four.
template <int j>
PVK_INLINE Vec<float> spread(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_permute_ps(__mmask16(-1), x, j * 0x55);
#else
  return _mm256_permute_ps(x, j * 0x55);
#endif
}

// Of each eight lanes, the low four (half = 0) or the high four, twice.
template <int half>
PVK_INLINE Vec<float> double_half(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_shuffle_f32x4(__mmask16(-1), x, x, half == 0 ? 0xa0 : 0xf5);
#else
  return x;
#endif
}

template <int j, int kRows>
PVK_INLINE void multiply_channel(Tile<float, kRows, 1>& tile, const Vec<float> (&value)[kRows], const float* panel) {
  const Vec<float> weight = load(panel);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) tile.sum[i][0] = fma(spread<j>(value[i]), weight, tile.sum[i][0]);
}

template <int kRows>
PVK_INLINE void multiply_four(Tile<float, kRows, 1>& tile, const Vec<float> (&value)[kRows], const float* panel) {
  multiply_channel<0>(tile, value, panel);
  multiply_channel<1>(tile, value, panel + kLanes<float>);
  multiply_channel<2>(tile, value, panel + 2 * kLanes<float>);
  multiply_channel<3>(tile, value, panel + 3 * kLanes<float>);
}

// zeros: taps that point there are left out, of tiles of one row; or null.
template <int kGroup, int kRows>
PVK_INLINE void multiply_groups(Tile<float, kRows, 1>& tile, const GemmBlock<float>& b, int64_t row,
                                const float* zeros) {
  for (int64_t tap = 0; tap < b.taps; ++tap) {
    const float* const* const rows = b.rows + tap * b.row_pitch + row;
    if (kRows == 1 && zeros != nullptr && rows[0] == zeros) continue;
    const float* const panel = b.panel + tap * kGroup * kLanes<float>;
    Vec<float> value[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) value[i] = load(rows[i] + b.first);
    if constexpr (kGroup == 4) {
      multiply_four(tile, value, panel);
    } else {
      Vec<float> half[kRows];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) half[i] = double_half<0>(value[i]);
      multiply_four(tile, half, panel);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) half[i] = double_half<1>(value[i]);
      multiply_four(tile, half, panel + 4 * kLanes<float>);
    }
  }
}

template <int kGroup>
void gemm_groups_of(const GemmBlock<float>& b, const float* zeros) {
  constexpr int kMax = kRegisterBytes == 64 ? 12 : 6;
  const int64_t tiles = zeros != nullptr ? b.count : ceil_div<int64_t>(b.count, kMax);
  int64_t row = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int count = int(ceil_div<int64_t>(b.count - row, tiles - tile));
    with_rows<kMax>(count, [&](auto rows) __attribute__((always_inline)) {
      Tile<float, decltype(rows)::value, 1> sums;
      if (b.finish != nullptr) sums.prefetch(*b.finish, row);
      sums.clear();
      multiply_groups<kGroup>(sums, b, row, zeros);
      if (b.finish != nullptr) return sums.finish(*b.finish, row);
      sums.store(b.sums + row * b.pitch, b.pitch);
    });
    row += count;
  }
}

#endif

// gemm_block() for such groups.
inline void gemm_groups([[maybe_unused]] const GemmBlock<float>& b, [[maybe_unused]] int channels,
                        [[maybe_unused]] const float* zeros) {
#if defined(__AVX512F__)
  if (channels == 8) return gemm_groups_of<8>(b, zeros);
#endif
#if defined(__AVX2__)
  gemm_groups_of<4>(b, zeros);
#endif
}

}  // namespace pvk::conv2d::PVK_ISA
