// The products of Winograd's convolution: for each element of a tile, tiles x channels times channels x outputs.
//
// Sums of kRows tiles x kVectors registers of outputs stay in registers for kDepthChunk channels and are then added to
// those of the channels before: shorter chains of additions round less, which F(4x4, 3x3) needs.
#pragma once

#include "core/gemm_tile.h"
#include "core/math.h"
#include "core/simd.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

constexpr int kPanel = 64;  // outputs of a panel of weights, on every instruction set
constexpr int64_t kDepthChunk = 128;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kProductVectors = 4;
#else
constexpr int kProductVectors = 2;
#endif
constexpr int kProductRows = 6;

// sums[row][:] (+)= sum over k of left[row][k] * right[k][:]. Fetches what the next tile takes from the left: rows are
// too short for the processor to foresee it.
template <typename T, int kRows, int kVectors>
inline void product_tile(const T* left, int64_t left_pitch, const T* right, int64_t depth, T* sums, int64_t sums_pitch,
                         bool add, const T* next_left) {
  constexpr int kStep = 64 / sizeof(T);  // channels in a cache line
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[row][v] = Vec<T>{};
  for (int64_t k = 0; k < depth; k += kStep) {
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) __builtin_prefetch(next_left + row * left_pitch + k);
    const T* const end = right + min_of<int64_t>(kStep, depth - k) * kPanel;
#pragma GCC unroll 4
    for (; right != end; right += kPanel, ++left) {
      Vec<T> weight[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weight[v] = load(right + v * kLanes<T>);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
        const Vec<T> value = splat(left[row * left_pitch]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[row][v] = fma(value, weight[v], sum[row][v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    T* target = sums + row * sums_pitch;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> before = add ? load(target + v * kLanes<T>) : Vec<T>{};
      store(target + v * kLanes<T>, add ? before + sum[row][v] : sum[row][v]);
    }
  }
}

template <typename T, int kVectors>
inline void product_columns(const T* left, int64_t left_pitch, int64_t rows, const T* right, int64_t depth, T* sums,
                            int64_t sums_pitch, bool add, const T* next_left) {
  const int64_t tiles = ceil_div<int64_t>(rows, kProductRows);
  // Dealt out evenly: no tile of a single row at the end.
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t count = ceil_div(rows, tiles - tile);
    const T* const next = tile + 1 < tiles ? left + count * left_pitch : next_left;
    with_rows<kProductRows>(int(count), [&](auto tag) __attribute__((always_inline)) {
      product_tile<T, decltype(tag)::value, kVectors>(left, left_pitch, right, depth, sums, sums_pitch, add, next);
    });
    rows -= count;
    left += count * left_pitch;
    sums += count * sums_pitch;
  }
}

// sums[row][column] (+)= sum over k of left[row][k] * right[k][column], for at most kDepthChunk channels; columns are
// computed in whole registers. next_left: where the left of the next product begins.
template <typename T>
inline void product_chunk(const T* left, int64_t left_pitch, int64_t rows, const T* right, int64_t depth,
                          int64_t columns, T* sums, int64_t sums_pitch, bool add, const T* next_left) {
  for (int64_t column = 0; column < columns; column += kProductVectors * kLanes<T>) {
    const T* const panel = right + column;
    T* const target = sums + column;
    const int64_t vectors = ceil_div<int64_t>(columns - column, kLanes<T>);
    if (vectors >= 4 && kProductVectors == 4) {
      product_columns<T, kProductVectors>(left, left_pitch, rows, panel, depth, target, sums_pitch, add, next_left);
    } else if (vectors == 3 && kProductVectors == 4) {
      product_columns<T, 3>(left, left_pitch, rows, panel, depth, target, sums_pitch, add, next_left);
    } else if (vectors >= 2) {
      product_columns<T, 2>(left, left_pitch, rows, panel, depth, target, sums_pitch, add, next_left);
    } else {
      product_columns<T, 1>(left, left_pitch, rows, panel, depth, target, sums_pitch, add, next_left);
    }
  }
}

// The same for any number of channels, none included, and without (+).
template <typename T>
inline void product(const T* left, int64_t left_pitch, int64_t rows, const T* right, int64_t depth, int64_t columns,
                    T* sums, int64_t sums_pitch, const T* next_left) {
  int64_t k = 0;
  do {
    const int64_t chunk = min_of(kDepthChunk, depth - k);
    product_chunk(left + k, left_pitch, rows, right + k * kPanel, chunk, columns, sums, sums_pitch, k > 0,
                  k + chunk < depth ? left + k + chunk : next_left);
    k += chunk;
  } while (k < depth);
}

}  // namespace pvk::conv2d::PVK_ISA
