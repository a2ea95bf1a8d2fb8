// Position-sensitive RoI align and pool, gradient of the map, without atomics: every element is gathered by one
// thread, RoI after RoI. A plane has one bin of every RoI, and few of these bins lie under a pixel.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/ps_roi_align/ps_roi_align.h"
#include "ops/ps_roi_align/roi.cuh"
#include "ops/roi_align/backward.cuh"

namespace pvk::ps_roi_align {

constexpr int kSide = 16;  // of a tile of pixels
static_assert(kSide * kSide == kBlockThreads && 2 * kSide == kWarpSize);

// False only where bin b has no weight on pixels [first, first + kSide).
template <typename T>
PVK_DEVICE bool may_touch(const PsRoiParams& p, const RoiAxis<T>& axis, int b, int64_t bins, int64_t size,
                          int64_t first) {
  if (p.pool) {
    const SampleRange pixels = pixel_range(axis, b, size);
    return pixels.begin < first + kSide && pixels.end > first;
  }
  const T slack = roi_align::position_slack(axis, bins, size) + T(1);
  const T start = axis.start + T(b) * axis.bin, end = start + axis.bin;
  return axis.grid > T(0) && !(max_of(start, end) + slack < T(first)) &&
         !(min_of(start, end) - slack > T(first + kSide - 1));
}

// The weight of a pixel in bin b.
template <typename T>
PVK_DEVICE T pixel_weight(const PsRoiParams& p, const RoiAxis<T>& axis, int b, int64_t bins, int64_t size,
                          int64_t pixel) {
  if (pixel >= size) return T(0);
  if (p.pool) {
    const SampleRange pixels = pixel_range(axis, b, size);
    return pixel >= pixels.begin && pixel < pixels.end ? T(1) : T(0);
  }
  const T slack = roi_align::position_slack(axis, bins, size);
  return roi_align::pixel_weight(axis, b, pixel, size, slack, p.sampling_ratio <= 0);
}

// What a block owns: kSide x kSide pixels of one image, in the planes of one bin, for channels from c on.
struct Tile {
  int64_t image, y, x, c;
  int ph, pw;
};

PVK_DEVICE Tile find_tile(const PsRoiParams& p, int channels) {
  const int64_t chunks = ceil_div(p.C, int64_t(channels)), across = ceil_div(p.W, int64_t(kSide));
  const int64_t down = ceil_div(p.H, int64_t(kSide));
  int64_t index = blockIdx.x;
  Tile tile;
  tile.c = index % chunks * channels;
  index /= chunks;
  tile.x = index % across * kSide;
  index /= across;
  tile.y = index % down * kSide;
  index /= down;
  tile.pw = int(index % p.PW);
  index /= p.PW;
  tile.ph = int(index % p.PH);
  tile.image = index / p.PH;
  return tile;
}

// A RoI's weights on the rows, already divided, and on the columns of a tile.
template <typename T>
struct RoiLines {
  int64_t k;
  T row[kSide], column[kSide];
};

// Calls add(lines) for every RoI whose bin may touch the tile, in ascending order. Threads test a batch of RoIs and the
// block lists the hits; then each warp builds the lines of one, lanes 0-15 the tile's rows and 16-31 its columns.
template <typename T, typename Add>
PVK_DEVICE void for_each_roi(const PsRoiParams& p, const Tile& tile, const Add& add) {
  SIMT_SHARED(RoiLines<T>[kWarps], lines);
  SIMT_SHARED(int[kBlockThreads], hits);
  SIMT_SHARED(int[kWarps], warp_hits);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  for (int64_t k0 = 0; k0 < p.K; k0 += kBlockThreads) {
    bool hit = false;
    if (k0 + threadIdx.x < p.K) {
      const Roi<T> roi = load_roi<T>(p, k0 + threadIdx.x);
      hit = roi.image == tile.image && may_touch(p, roi.y, tile.ph, p.PH, p.H, tile.y) &&
            may_touch(p, roi.x, tile.pw, p.PW, p.W, tile.x);
    }
    const unsigned mask = ballot(hit);
    if (lane == 0) warp_hits[warp] = __popc(mask);
    __syncthreads();
    int before = 0, num_hits = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? warp_hits[w] : 0;
      num_hits += warp_hits[w];
    }
    if (hit) hits[before + __popc(mask & bits_below(lane))] = threadIdx.x;
    __syncthreads();

    for (int h0 = 0; h0 < num_hits; h0 += kWarps) {
      if (h0 + warp < num_hits) {
        const int64_t k = k0 + hits[h0 + warp];
        const Roi<T> roi = load_roi<T>(p, k);
        const bool is_column = lane >= kSide;
        const int i = lane % kSide;
        const T weight = is_column ? pixel_weight(p, roi.x, tile.pw, p.PW, p.W, tile.x + i)
                                   : pixel_weight(p, roi.y, tile.ph, p.PH, p.H, tile.y + i);
        if (is_column) {
          lines[warp].column[i] = weight;
        } else {
          lines[warp].row[i] = weight / (divisor_of(p, roi.y, tile.ph, p.H) * divisor_of(p, roi.x, tile.pw, p.W));
        }
        if (lane == 0) lines[warp].k = k;
      }
      __syncthreads();
      for (int h = h0; h < num_hits && h < h0 + kWarps; ++h) add(lines[h - h0]);
      __syncthreads();
    }
  }
}

// A thread owns one pixel of the tile and CHANNELS planes: one for each channel, all of the same bin. Any strides,
// fastest where W has stride 1. All threads read the same gradients of a RoI. Sums in opmath_t, one rounding.
template <typename scalar_t, int CHANNELS>
__global__ void __launch_bounds__(kBlockThreads, sizeof(scalar_t) == 8 ? 1 : 2)
    ps_roi_align_backward_kernel(const __grid_constant__ PsRoiParams p) {
  using T = opmath_t<scalar_t>;
  constexpr int kBatch = 8;  // loads in flight
  const Tile tile = find_tile(p, CHANNELS);
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  const int channels = int(min_of(p.C - tile.c, int64_t(CHANNELS)));
  const scalar_t* const pooled = static_cast<const scalar_t*>(p.pooled) + tile.c * p.pooled_stride[1] +
                                 tile.ph * p.pooled_stride[2] + tile.pw * p.pooled_stride[3];
  T sum[CHANNELS] = {};

  for_each_roi<T>(p, tile, [&](const RoiLines<T>& lines) {
    const T weight = lines.row[row] * lines.column[column];
    if (weight == T(0)) return;
    const scalar_t* gradient = pooled + lines.k * p.pooled_stride[0];
#pragma unroll
    for (int u = 0; u < CHANNELS; u += kBatch) {
      if (u >= channels) break;
      T loaded[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {  // past the last channel it repeats that one
        loaded[i] = to_opmath(__ldg(gradient));
        if (u + i + 1 < channels) gradient += p.pooled_stride[1];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum[u + i] += weight * loaded[i];
    }
  });

  if (tile.y + row >= p.H || tile.x + column >= p.W) return;
  const int64_t bins = p.PH * p.PW;
  scalar_t* const pixel = static_cast<scalar_t*>(p.map) + tile.image * p.map_stride[0] +
                          (tile.c * bins + tile.ph * p.PW + tile.pw) * p.map_stride[1] +
                          (tile.y + row) * p.map_stride[2] + (tile.x + column) * p.map_stride[3];
#pragma unroll
  for (int u = 0; u < CHANNELS; ++u) {
    if (u < channels) pixel[u * bins * p.map_stride[1]] = from_opmath<scalar_t>(sum[u]);
  }
}

}  // namespace pvk::ps_roi_align
