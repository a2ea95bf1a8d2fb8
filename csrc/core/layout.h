// Copies of maps between channels_last and any strides, by tiles of rows.
#pragma once

#include "core/math.h"
#include "core/parallel.h"
#include "core/transpose.h"

namespace pvk::PVK_ISA {

struct MapSize {
  int64_t N, C, H, W;
};

inline constexpr int64_t kTilePixels = 64;
inline constexpr int64_t kTileChannels = 64;

// Calls body(n, first channel, channels, first row, row of the first pixel, pixels) for tiles of rows of a map.
template <typename Body>
void for_each_tile(const MapSize& size, const Body& body) {
  const int64_t blocks_c = ceil_div(size.C, kTileChannels), blocks_w = ceil_div(size.W, kTilePixels);
  const int64_t rows = size.N * size.H;
  const int64_t a_row = blocks_c * blocks_w;
  parallel_for(rows * a_row, max_of(int64_t(1), int64_t(16)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / a_row, c = i % a_row / blocks_w * kTileChannels, w = i % blocks_w * kTilePixels;
      body(row / size.H, c, min_of(kTileChannels, size.C - c), row % size.H, w, min_of(kTilePixels, size.W - w));
    }
  });
}

// Rows that follow each other evenly are one long row: those of a small map are shorter than a tile.
inline MapSize joined_rows(const MapSize& size, const int64_t* stride) {
  if (stride[2] != size.W * stride[3]) return size;
  return {size.N, size.C, 1, size.H * size.W};
}

// to[n][h][w][c] = from[n][c][h][w], of any strides.
template <typename scalar_t>
void to_channels_last(const MapSize& map, const scalar_t* from, const int64_t* stride, scalar_t* to) {
  using T = opmath_t<scalar_t>;
  const MapSize size = joined_rows(map, stride);
  for_each_tile(size, [&](int64_t n, int64_t c, int64_t channels, int64_t h, int64_t w, int64_t pixels) {
    alignas(64) T tile[kTilePixels * kTileChannels];
    const scalar_t* source = from + n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
    scalar_t* target = to + ((n * size.H + h) * size.W + w) * size.C + c;
    load_tile(tile, kTileChannels, source, stride[1], stride[3], channels, pixels);
    store_tile(target, tile, kTileChannels, 1, size.C, channels, pixels);
  });
}

template <typename scalar_t>
void from_channels_last(const MapSize& map, const scalar_t* from, const int64_t* stride, scalar_t* to) {
  using T = opmath_t<scalar_t>;
  const MapSize size = joined_rows(map, stride);
  for_each_tile(size, [&](int64_t n, int64_t c, int64_t channels, int64_t h, int64_t w, int64_t pixels) {
    alignas(64) T tile[kTilePixels * kTileChannels];
    const scalar_t* source = from + ((n * size.H + h) * size.W + w) * size.C + c;
    scalar_t* target = to + n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
    load_tile(tile, kTileChannels, source, 1, size.C, channels, pixels);
    store_tile(target, tile, kTileChannels, stride[1], stride[3], channels, pixels);
  });
}

inline void set_channels_last(int64_t* stride, const MapSize& size) {
  stride[0] = size.H * size.W * size.C;
  stride[1] = 1;
  stride[2] = size.W * size.C;
  stride[3] = size.C;
}

}  // namespace pvk::PVK_ISA
