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

inline void set_channels_last(int64_t* stride, const MapSize& size) {
  stride[0] = size.H * size.W * size.C;
  stride[1] = 1;
  stride[2] = size.W * size.C;
  stride[3] = size.C;
}

// Rows that follow each other evenly are one long row: those of a small map are shorter than a tile.
inline MapSize joined_rows(const MapSize& size, const int64_t* stride) {
  if (stride[2] != size.W * stride[3]) return size;
  return {size.N, size.C, 1, size.H * size.W};
}

// Calls body(offset of a tile in channels_last, offset by `stride`, channels, pixels) for tiles of rows.
template <typename Body>
void for_each_tile(const MapSize& map, const int64_t* stride, const Body& body) {
  const MapSize size = joined_rows(map, stride);
  const int64_t blocks_c = ceil_div(size.C, kTileChannels), blocks_w = ceil_div(size.W, kTilePixels);
  const int64_t a_row = blocks_c * blocks_w;
  parallel_for(size.N * size.H * a_row, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / a_row, c = i % a_row / blocks_w * kTileChannels, w = i % blocks_w * kTilePixels;
      const int64_t place = row / size.H * stride[0] + c * stride[1] + row % size.H * stride[2] + w * stride[3];
      body((row * size.W + w) * size.C + c, place, min_of(kTileChannels, size.C - c), min_of(kTilePixels, size.W - w));
    }
  });
}

// to[n][h][w][c] = from[n][c][h][w], of any strides.
template <typename scalar_t>
void to_channels_last(const MapSize& map, const scalar_t* from, const int64_t* stride, scalar_t* to) {
  for_each_tile(map, stride, [&](int64_t last, int64_t any, int64_t channels, int64_t pixels) {
    alignas(64) opmath_t<scalar_t> tile[kTilePixels * kTileChannels];
    load_tile(tile, kTileChannels, from + any, stride[1], stride[3], channels, pixels);
    store_tile(to + last, tile, kTileChannels, 1, map.C, channels, pixels);
  });
}

template <typename scalar_t>
void from_channels_last(const MapSize& map, const scalar_t* from, const int64_t* stride, scalar_t* to) {
  for_each_tile(map, stride, [&](int64_t last, int64_t any, int64_t channels, int64_t pixels) {
    alignas(64) opmath_t<scalar_t> tile[kTilePixels * kTileChannels];
    load_tile(tile, kTileChannels, from + last, 1, map.C, channels, pixels);
    store_tile(to + any, tile, kTileChannels, stride[1], stride[3], channels, pixels);
  });
}

}  // namespace pvk::PVK_ISA
