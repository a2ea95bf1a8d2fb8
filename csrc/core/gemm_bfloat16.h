// gemm_tile.h for bfloat16 rows and panels, by the dot-product instructions of AVX512-BF16: sums are float32.
//
// A panel is [k / 2][width][2]: pairs of neighbours along k, a zero where the last has none. Subnormal inputs count as
// zero. Only the AVX-512 copy of a kernel has it, and runs it where cpu_has_bfloat16_dot() (core/isa.h).
#pragma once

#include "core/gemm_tile.h"

#if defined(__AVX512F__)

namespace pvk::PVK_ISA {

#define PVK_BFLOAT16_DOT __attribute__((target("avx512bf16")))

using GemmBlockBFloat16 = GemmBlock<float, BFloat16, BFloat16>;

template <int kRows, int kVectors>
PVK_BFLOAT16_DOT void gemm_tile_bfloat16(const GemmBlockBFloat16& b, int64_t first_row) {
  constexpr int kPairs = kVectors * kLanes<float>;  // of a row of the panel
  Tile<float, kRows, kVectors> tile;
  if (b.finish != nullptr) tile.prefetch(*b.finish, first_row);
  tile.clear();
  for (int64_t tap = 0; tap < b.taps; ++tap) {
    const BFloat16* const* const tap_rows = b.rows + tap * b.row_pitch + first_row;
    if (b.zeros != nullptr && all_are<kRows>(tap_rows, b.zeros)) continue;
    const BFloat16* row[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) row[i] = tap_rows[i] + b.first;
    const BFloat16* panel = b.panel + tap * b.tap_pitch;
    int64_t k = 0;
#pragma GCC unroll 4
    for (; k + 2 <= b.depth; k += 2, panel += 2 * kPairs) {
      __m512bh weight[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weight[v] = (__m512bh)_mm512_loadu_si512(panel + v * 2 * kLanes<float>);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, row[i] + k, 4);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) tile.sum[i][v] = _mm512_dpbf16_ps(tile.sum[i][v], value, weight[v]);
      }
    }
    if (k == b.depth) continue;
    for (int v = 0; v < kVectors; ++v) {
      const __m512bh weight = (__m512bh)_mm512_loadu_si512(panel + v * 2 * kLanes<float>);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
        tile.sum[i][v] = _mm512_dpbf16_ps(tile.sum[i][v], (__m512bh)_mm512_set1_epi32(row[i][k].bits), weight);
    }
  }
  float* const target = b.sums + first_row * b.pitch;
  if (b.accumulate) tile.add(target, b.pitch);
  if (b.finish != nullptr) {
    tile.finish(*b.finish, first_row);
  } else {
    tile.store(target, b.pitch);
  }
}

inline void gemm_block(const GemmBlockBFloat16& b, int vectors) {
  with_vectors(vectors, [&](auto v) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(v)::value;
    constexpr int kMax = kTileRows[kVectors];
    const int64_t tiles = ceil_div<int64_t>(b.count, kMax);
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int count = int(ceil_div<int64_t>(b.count - row, tiles - tile));
      with_rows<kMax>(count, [&](auto rows) __attribute__((always_inline)) {
        gemm_tile_bfloat16<decltype(rows)::value, kVectors>(b, row);
      });
      row += count;
    }
  });
}

}  // namespace pvk::PVK_ISA

#endif
