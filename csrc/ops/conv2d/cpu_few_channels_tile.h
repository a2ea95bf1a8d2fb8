// The register tile of convolution of few input channels: some pixels x a panel of output channels, through all taps.
//
// Only cpu_few_channels.cpp includes it.
#pragma once

#include <cstdint>

#include "core/cheap_activation.h"
#include "core/simd.h"
#include "core/simd_partial.h"
#include "ops/conv2d/cpu_pool.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Widest panel in registers, and pixels of a tile for each width: sums, a row of weights and an input fit the
// registers.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kVectors = 4;
inline constexpr int kPixels[] = {0, 8, 8, 8, 6};
#elif defined(__AVX2__)
inline constexpr int kVectors = 2;
inline constexpr int kPixels[] = {0, 6, 6};
#else
inline constexpr int kVectors = 2;
inline constexpr int kPixels[] = {0, 4, 4};
#endif

// What a tile computes: sum over taps of pixel[offset of the tap] * panel[tap], of each pixel. It goes finished to
// `outputs`, else to sums[pixel][panel]: finished where there is a scale, or as it is.
template <typename scalar_t>
struct Tiles {
  using T = opmath_t<scalar_t>;
  const T* const* pixels;
  scalar_t* const* outputs;  // or null
  T* sums;
  const int64_t* offsets;
  int64_t taps;
  const T* panel;
  const T *scale, *shift;  // or null
  const CheapActivation<T>* activation;
  int64_t last_lanes;  // of the panel's last register, that outputs have
};

template <int kWide, typename scalar_t, typename T>
void convolve_tile(const Tiles<scalar_t>& tiles, int64_t first) {
  constexpr int kCount = kPixels[kWide], kWidth = kWide * kLanes<T>;
  Vec<T> total[kWide][kCount];
  const T* pixel[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    pixel[i] = tiles.pixels[first + i];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) total[v][i] = Vec<T>{};
  }
  const T* panel = tiles.panel;
  for (int64_t t = 0; t < tiles.taps; ++t, panel += kWidth) {
    const int64_t offset = tiles.offsets[t];
    Vec<T> weight[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) weight[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      const Vec<T> x = splat(pixel[i][offset]);
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) total[v][i] = fma(x, weight[v], total[v][i]);
    }
  }
  if (tiles.scale != nullptr) {
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) {
      const Vec<T> scale = load(tiles.scale + v * kLanes<T>), shift = load(tiles.shift + v * kLanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) total[v][i] = fma(total[v][i], scale, shift);
    }
    tiles.activation->apply([&](auto operation) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v)
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) total[v][i] = operation(total[v][i]);
    });
  }
  if (tiles.outputs == nullptr) {
    T* const sums = tiles.sums + first * kWidth;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) store(sums + i * kWidth + v * kLanes<T>, total[v][i]);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    scalar_t* const output = tiles.outputs[first + i];
#pragma GCC unroll 4
    for (int v = 0; v < kWide - 1; ++v) store(output + v * kLanes<T>, total[v][i]);
    scalar_t* const last = output + (kWide - 1) * kLanes<T>;
    if (tiles.last_lanes == kLanes<T>) {
      store(last, total[kWide - 1][i]);
    } else {
      store_first(last, total[kWide - 1][i], tiles.last_lanes);
    }
  }
}

// Of `count` pixels, and of those that fill up the last tile.
template <int kWide, typename scalar_t>
void convolve_chunk(const Tiles<scalar_t>& tiles, int64_t count) {
  for (int64_t i = 0; i < count; i += kPixels[kWide]) convolve_tile<kWide, scalar_t, opmath_t<scalar_t>>(tiles, i);
}

template <typename scalar_t>
void convolve_chunk_of(int64_t wide, const Tiles<scalar_t>& tiles, int64_t count) {
  if (wide == 1) return convolve_chunk<1>(tiles, count);
  if (wide == 2 || kVectors == 2) return convolve_chunk<2>(tiles, count);
  if constexpr (kVectors > 2) {
    if (wide == 3) return convolve_chunk<3>(tiles, count);
    return convolve_chunk<4>(tiles, count);
  }
}

}  // namespace pvk::conv2d::PVK_ISA
