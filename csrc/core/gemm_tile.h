// The register tile of every matrix product on the CPU: a few rows times a packed panel of weights.
//
// A panel is [k][width]: width is 1 to kTileVectors registers of outputs, zeros where there are no more. A tile holds
// rows x width sums in registers; each step of k loads one row of the panel and multiplies it with one element of each
// row, broadcast. Rows are given by pointers, so a convolution points them at the pixels that its taps read.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/simd.h"

namespace pvk::PVK_ISA {

// Widest panel in registers, and most rows for each width: the sums, a row of the panel and one broadcast element fit
// the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileVectors = 4;
inline constexpr int kTileRows[] = {0, 12, 12, 8, 6};
#elif defined(__AVX2__)
inline constexpr int kTileVectors = 2;
inline constexpr int kTileRows[] = {0, 12, 6};
#else
inline constexpr int kTileVectors = 2;
inline constexpr int kTileRows[] = {0, 6, 4};
#endif
inline constexpr int kMaxTileRows = 12;

template <typename T>
inline constexpr int kPanelWidth = kTileVectors * kLanes<T>;

template <typename T, int kRows, int kVectors>
struct Tile {
  Vec<T> sum[kRows][kVectors];

  PVK_INLINE void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Vec<T>{};
  }

  PVK_INLINE void load(const T* source, int64_t pitch) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = PVK_ISA::load(source + i * pitch + v * kLanes<T>);
  }

  PVK_INLINE void store(T* target, int64_t pitch) const {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) PVK_ISA::store(target + i * pitch + v * kLanes<T>, sum[i][v]);
  }

  // sum[i] += the sum over k in [0, depth) of rows[i][k] * panel[k].
  PVK_INLINE void multiply(const T* const* rows, const T* panel, int64_t depth) {
    constexpr int kWidth = kVectors * kLanes<T>;
    const T* row[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) row[i] = rows[i];
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4, panel += 4 * kWidth) {
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) this->step(row, k + step, panel + step * kWidth);
    }
    for (; k < depth; ++k, panel += kWidth) step(row, k, panel);
  }

 private:
  PVK_INLINE void step(const T* const (&row)[kRows], int64_t k, const T* panel) {
    Vec<T> weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weight[v] = PVK_ISA::load(panel + v * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> value = splat(row[i][k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(value, weight[v], sum[i][v]);
    }
  }
};

template <int kValue>
struct IntTag {
  static constexpr int value = kValue;
};

// body(IntTag<rows>) for 1 <= rows <= kMax.
template <int kMax, typename Body>
PVK_INLINE void with_rows(int rows, const Body& body) {
  if constexpr (kMax == 1) {
    body(IntTag<1>{});
  } else {
    if (rows == kMax) return body(IntTag<kMax>{});
    with_rows<kMax - 1>(rows, body);
  }
}

// body(IntTag<vectors>) for 1 <= vectors <= kTileVectors.
template <int kMax = kTileVectors, typename Body>
PVK_INLINE void with_vectors(int vectors, const Body& body) {
  with_rows<kMax>(vectors, body);
}

// A block of rows times a panel: what gemm_block reads and writes.
template <typename T>
struct GemmBlock {
  const T* const* rows;  // [taps][row_pitch] pointers, of which the first `count` are used
  int64_t row_pitch;
  int64_t count;       // rows of the result
  int64_t taps;        // segments of k, each `depth` long
  int64_t depth;
  const T* panel;      // [taps][depth][width]; tap_pitch elements from one tap to the next
  int64_t tap_pitch;
  T* sums;             // [count][pitch]
  int64_t pitch;
  bool accumulate;     // sums += instead of sums =
};

// The last tile of a block is not left with a single row: rows are dealt out evenly.
template <typename T, int kVectors>
void gemm_block_of(const GemmBlock<T>& b) {
  constexpr int kMax = kTileRows[kVectors];
  const int64_t tiles = ceil_div<int64_t>(b.count, kMax);
  int64_t row = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int count = int(ceil_div<int64_t>(b.count - row, tiles - tile));
    with_rows<kMax>(count, [&](auto rows) __attribute__((always_inline)) {
      Tile<T, decltype(rows)::value, kVectors> sums;
      T* const target = b.sums + row * b.pitch;
      if (b.accumulate) {
        sums.load(target, b.pitch);
      } else {
        sums.clear();
      }
      for (int64_t tap = 0; tap < b.taps; ++tap)
        sums.multiply(b.rows + tap * b.row_pitch + row, b.panel + tap * b.tap_pitch, b.depth);
      sums.store(target, b.pitch);
    });
    row += count;
  }
}

// sums[i][:] (+)= sum over taps and k of rows[tap][i][k] * panel[tap][k][:], for a panel of `vectors` registers.
template <typename T>
void gemm_block(const GemmBlock<T>& block, int vectors) {
  with_vectors(vectors, [&](auto v) __attribute__((always_inline)) { gemm_block_of<T, decltype(v)::value>(block); });
}

}  // namespace pvk::PVK_ISA
