// The register tile of depthwise convolution in channels_last: kColumns outputs of a row, registers along C.
//
// Only cpu_depthwise.cpp includes it.
#pragma once

#include <cstdint>

#include "core/cheap_activation.h"
#include "core/simd.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Output columns of a register tile. AVX2's 16 registers hold 8 sums, a row of up to 7 weights and an input.
inline constexpr int kColumns = 8;

// kColumns outputs of a row, at a block of channels.
template <typename T>
struct DepthwiseTile {
  const T* input;
  const T* weight;         // [R * S][pitch]
  const int64_t* rows;     // tap r reads rows[r * row_step]
  const int64_t* columns;  // tap s of output o reads columns[o * stride + s * column_step]
  int64_t R, S, row_step, column_step, stride, pitch;
  // What the next tile reads first: rows ahead[i * ahead_step], columns like those of this one.
  const int64_t *ahead, *ahead_columns;
  int64_t ahead_count, ahead_step;
};

// The next tile's input at channel c, while this tile computes: a tile's runs are too short for the hardware to see.
// With stride 2 it is more than the first-level cache has place for.
template <int S, int kStride, typename T>
PVK_INLINE void prefetch_ahead(const DepthwiseTile<T>& tile, int64_t c) {
  for (int64_t r = 0; r < tile.ahead_count; ++r) {
    const int64_t row = tile.ahead[r * tile.ahead_step];
    if (row < 0) continue;
    const T* const x = tile.input + row + c;
#pragma GCC unroll 16
    for (int i = 0; i < (S > 0 ? kColumns * kStride : kColumns); ++i)
      __builtin_prefetch(x + tile.ahead_columns[S > 0 ? i + S / 2 : i * tile.stride], 0, kStride == 2 ? 2 : 3);
  }
}

// A row of taps: each input register is loaded once and goes into every sum that it is part of.
template <int S, int kStride, typename T>
PVK_INLINE void add_row(Vec<T>* sums, const T* row, const int64_t* columns, const T* weight, int64_t pitch) {
  Vec<T> w[S];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) w[s] = load(weight + s * pitch);
#pragma GCC unroll 32
  for (int i = 0; i < (kColumns - 1) * kStride + S; ++i) {
    if (columns[i] < 0) continue;
    const Vec<T> x = load(row + columns[i]);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      if (i >= s && (i - s) % kStride == 0 && (i - s) / kStride < kColumns)
        sums[(i - s) / kStride] = fma(x, w[s], sums[(i - s) / kStride]);
    }
  }
}

// The same for any kernel size, stride and dilation.
template <typename T>
PVK_INLINE void add_any_row(Vec<T>* sums, const T* row, const DepthwiseTile<T>& tile, const T* weight) {
  for (int64_t s = 0; s < tile.S; ++s) {
    const Vec<T> w = load(weight + s * tile.pitch);
    const int64_t* column = tile.columns + s * tile.column_step;
#pragma GCC unroll 8
    for (int o = 0; o < kColumns; ++o, column += tile.stride)
      if (*column >= 0) sums[o] = fma(load(row + *column), w, sums[o]);
  }
}

template <int S, int kStride, typename T>
PVK_INLINE void convolve(Vec<T>* sums, const DepthwiseTile<T>& tile, int64_t c) {
#pragma GCC unroll 8
  for (int o = 0; o < kColumns; ++o) sums[o] = Vec<T>{};
  for (int64_t r = 0; r < tile.R; ++r) {
    const int64_t row = tile.rows[r * tile.row_step];
    if (row < 0) continue;
    const T* x = tile.input + row + c;
    const T* w = tile.weight + r * tile.S * tile.pitch + c;
    if constexpr (S > 0) {
      add_row<S, kStride, T>(sums, x, tile.columns, w, tile.pitch);
    } else {
      add_any_row<T>(sums, x, tile, w);
    }
  }
}

// Registers of `channels`, the last one overlapping the one before.
template <typename T, typename Body>
PVK_INLINE void for_registers(int64_t channels, const Body& body) {
  for (int64_t c = 0; c < channels; c += kLanes<T>)
    body(c + kLanes<T> <= channels || channels < kLanes<T> ? c : channels - kLanes<T>);
}

// A store of a whole cache line that does not read it first, and leaves the cache to others.
template <typename scalar_t, typename V>
PVK_INLINE void stream(scalar_t* target, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 4) return _mm512_stream_ps(target, (__m512)value);
  if constexpr (sizeof(scalar_t) == 8) return _mm512_stream_pd(target, (__m512d)value);
#endif
  store(target, value);
}

PVK_INLINE void end_of_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Where the outputs of a tile go: finished, or as sums [o][c * M] of one m.
template <typename scalar_t>
struct DepthwiseOutputs {
  using T = opmath_t<scalar_t>;
  scalar_t* output;  // null: to sums
  int64_t pitch;
  int count;
  const T *scale, *shift;
  T* sums;
  int64_t sums_pitch, M;
  bool streams;
};

template <int S, int kStride, typename scalar_t, typename T>
void convolve_tile(const DepthwiseTile<T>& tile, int64_t channels, const DepthwiseOutputs<scalar_t>& out,
                   const CheapActivation<T>& activation) {
  for_registers<T>(channels, [&](int64_t c) __attribute__((always_inline)) {
    prefetch_ahead<S, kStride>(tile, c);
    Vec<T> sums[kColumns];
    convolve<S, kStride, T>(sums, tile, c);
    if (out.output != nullptr) {
      const Vec<T> scale = load(out.scale + c), shift = load(out.shift + c);
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o) sums[o] = fma(sums[o], scale, shift);
      activation.apply([&](auto operation) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int o = 0; o < kColumns; ++o) sums[o] = operation(sums[o]);
      });
      scalar_t* target = out.output + c;
      if (out.streams) {
#pragma GCC unroll 8
        for (int o = 0; o < kColumns; ++o, target += out.pitch)
          if (o < out.count) stream(target, sums[o]);
      } else {
#pragma GCC unroll 8
        for (int o = 0; o < kColumns; ++o, target += out.pitch)
          if (o < out.count) store(target, sums[o]);
      }
    } else if (out.M == 1) {
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o) store(out.sums + o * out.sums_pitch + c, sums[o]);
    } else {
      T lanes[kColumns][kLanes<T>];
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o) store(lanes[o], sums[o]);
      for (int o = 0; o < kColumns; ++o)
        for (int i = 0; i < kLanes<T>; ++i) out.sums[o * out.sums_pitch + (c + i) * out.M] = lanes[o][i];
    }
  });
}

}  // namespace pvk::conv2d::PVK_ISA
