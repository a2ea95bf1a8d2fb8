// RoI align, gradient of the map, without atomics: every element is gathered by one thread, RoI after RoI.
// The operator is separable, pooled = (Ay map Ax^T) / count, so a pixel needs one row of Ay and one of Ax per RoI.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/roi_align/roi.cuh"
#include "ops/roi_align/roi_align.h"

namespace pvk::roi_align {

constexpr int kLineBins = 4;    // bins of one axis that a line holds
constexpr int kRound = kWarps;  // RoIs that a block handles between two barriers

// The non-zero weights of one pixel row (or column): `count` successive bins of the RoI.
template <typename T>
struct Line {
  int64_t offset;  // of the first bin in the pooled tensor
  int count;
  T weight[kLineBins];
};

template <typename T, int ROWS, int COLUMNS>
struct RoiLines {
  Roi<T> roi;
  Line<T> row[ROWS], column[COLUMNS];
  int row_windows, column_windows;  // how many times kLineBins bins the longest line needs
};

// How far rounding may move a sample, generously.
template <typename T>
PVK_DEVICE T position_slack(const RoiAxis<T>& axis, int64_t bins, int64_t size) {
  constexpr T kEpsilon = std::is_same_v<T, double> ? T(2.3e-16) : T(1.2e-7);
  const T start = axis.start < T(0) ? -axis.start : axis.start;
  const T bin = axis.bin < T(0) ? -axis.bin : axis.bin;
  return T(32) * kEpsilon * (start + bin * T(bins) + T(size) + T(1));
}

// False only where no sample of the axis touches pixels [first, last].
template <typename T>
PVK_DEVICE bool may_touch(const RoiAxis<T>& axis, int64_t bins, int64_t size, int64_t first, int64_t last) {
  const T slack = position_slack(axis, bins, size) + T(1);
  const T end = axis.start + axis.bin * T(bins);
  return axis.grid > T(0) && !(max_of(axis.start, end) + slack < T(first)) &&
         !(min_of(axis.start, end) - slack > T(last));
}

// A number as an index in [0, size]; NaN as 0.
template <typename T>
PVK_DEVICE int64_t clamp_index(T value, int64_t size) {
  return value >= T(size) ? size : int64_t(max_of(T(0), value));
}

// The weight of `pixel` in bin p: only samples within one pixel of it are visited.
template <typename T>
PVK_DEVICE T pixel_weight(const RoiAxis<T>& axis, int64_t p, int64_t pixel, int64_t size, T slack, bool adaptive) {
  SampleRange samples = sample_range(axis, p, size, adaptive);
  if (samples.end - samples.begin > 4 && axis.bin != T(0)) {
    const T base = axis.start + T(p) * axis.bin;
    const T per_pixel = axis.grid / axis.bin;
    const T a = (T(pixel - 1) - slack - base) * per_pixel - T(0.5);
    const T b = (T(pixel + 1) + slack - base) * per_pixel - T(0.5);
    samples.begin = max_of(samples.begin, clamp_index(min_of(a, b), samples.end));
    samples.end = min_of(samples.end, clamp_index(max_of(a, b), samples.end) + 1);
  }
  T weight = T(0);
  for (int64_t i = samples.begin; i < samples.end; ++i) {
    const Tap<T> tap = make_tap(sample_position(axis, p, i), size);
    weight += (tap.low == pixel ? tap.low_weight : T(0)) + (tap.high == pixel ? tap.high_weight : T(0));
  }
  return weight;
}

// Fills window `window` of one pixel's line, and returns how many windows the line has.
template <typename T>
PVK_DEVICE int build_line(const RoiAxis<T>& axis, int64_t bins, int64_t pixel, int64_t size, bool adaptive,
                          int64_t stride, T scale, int window, Line<T>& line) {
  const T slack = position_slack(axis, bins, size);
  int64_t begin = 0, end = 0;
  if (pixel < size && may_touch(axis, bins, size, pixel, pixel)) {
    end = bins;
    if (axis.bin != T(0)) {
      const T a = (T(pixel - 1) - slack - axis.start) / axis.bin;
      const T b = (T(pixel + 1) + slack - axis.start) / axis.bin;
      begin = clamp_index(min_of(a, b), bins);
      end = min_of(clamp_index(max_of(a, b), bins) + 1, bins);
    }
  }
  const int64_t first = begin + int64_t(window) * kLineBins;
  int count = 0;
#pragma unroll 1
  for (int i = 0; i < kLineBins; ++i) {
    const T weight = first + i < end ? pixel_weight(axis, first + i, pixel, size, slack, adaptive) * scale : T(0);
    line.weight[i] = weight;
    if (weight != T(0)) count = i + 1;
  }
  line.offset = first * stride;
  line.count = count;
  return int(ceil_div(end - begin, int64_t(kLineBins)));
}

// What a block owns: pixels [y, y + ROWS) x [x, x + COLUMNS) and channels from c on of one image and level.
struct Tile {
  int level;
  int64_t image, y, x, c;
};

// Tiles are numbered level after level, and in each channel chunk first, so that neighbours share what they read of
// the boxes.
PVK_DEVICE Tile find_tile(const RoiAlignParams& p, const BackwardPlan& plan, int rows, int columns, int64_t channels) {
  Tile tile;
  tile.level = 0;
  while (tile.level + 1 < p.num_levels && blockIdx.x >= plan.first_tile[tile.level + 1]) ++tile.level;
  const Level& level = p.levels[tile.level];
  const int64_t chunks = ceil_div(p.C, channels), across = ceil_div(level.W, int64_t(columns));
  const int64_t down = ceil_div(level.H, int64_t(rows));
  int64_t index = blockIdx.x - plan.first_tile[tile.level];
  tile.c = index % chunks * channels;
  index /= chunks;
  tile.x = index % across * columns;
  index /= across;
  tile.y = index % down * rows;
  tile.image = index / down;
  return tile;
}

// Calls add(lines, k) for every RoI that may touch the tile, in ascending order. Threads test a batch of RoIs and the
// block lists the hits; then each warp builds the lines of one, lanes 0-15 the tile's rows and 16-31 its columns.
template <typename T, int ROWS, int COLUMNS, typename Add>
PVK_DEVICE void for_each_roi(const RoiAlignParams& p, const Tile& tile, const Add& add) {
  static_assert(ROWS <= 16 && COLUMNS <= 16);
  using Lines = RoiLines<T, ROWS, COLUMNS>;
  SIMT_SHARED(Lines[kRound], lines);
  SIMT_SHARED(int[kBlockThreads], hits);
  SIMT_SHARED(int[kWarps], warp_hits);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool adaptive = p.sampling_ratio <= 0;
  const int64_t H = p.levels[tile.level].H, W = p.levels[tile.level].W;

  for (int64_t k0 = 0; k0 < p.K; k0 += kBlockThreads) {
    bool hit = false;
    if (k0 + threadIdx.x < p.K) {
      const Roi<T> roi = load_roi<T>(p, k0 + threadIdx.x);
      hit = roi.image == tile.image && roi.level == tile.level &&
            may_touch(roi.y, p.PH, H, tile.y, tile.y + ROWS - 1) &&
            may_touch(roi.x, p.PW, W, tile.x, tile.x + COLUMNS - 1);
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

    for (int h0 = 0; h0 < num_hits; h0 += kRound) {
      bool more_rows = true;
      for (int row_window = 0; more_rows; ++row_window) {
        bool more_columns = true;
        for (int column_window = 0; more_columns; ++column_window) {
          if (h0 + warp < num_hits) {
            if (lane == 0) lines[warp].roi = load_roi<T>(p, k0 + hits[h0 + warp]);
            sync_warp();
            const Roi<T>& roi = lines[warp].roi;
            const bool is_column = lane >= 16;
            const int i = lane % 16;
            int windows = 0;
            if (is_column ? i < COLUMNS : i < ROWS) {
              const RoiAxis<T> axis = is_column ? roi.x : roi.y;
              windows = build_line(axis, is_column ? p.PW : p.PH, (is_column ? tile.x : tile.y) + i, is_column ? W : H,
                                   adaptive, p.pooled_stride[is_column ? 3 : 2], is_column ? T(1) : roi.inverse_count,
                                   is_column ? column_window : row_window,
                                   is_column ? lines[warp].column[i] : lines[warp].row[i]);
            }
            const unsigned row_windows = reduce_max(is_column ? 0 : windows);
            const unsigned column_windows = reduce_max(is_column ? windows : 0);
            if (lane == 0) {
              lines[warp].row_windows = int(row_windows);
              lines[warp].column_windows = int(column_windows);
            }
          }
          __syncthreads();
          more_rows = more_columns = false;
          for (int h = h0; h < num_hits && h < h0 + kRound; ++h) {
            const Lines& of_roi = lines[h - h0];
            add(of_roi, k0 + hits[h]);
            more_rows |= row_window + 1 < of_roi.row_windows;
            more_columns |= column_window + 1 < of_roi.column_windows;
          }
          __syncthreads();
        }
      }
    }
  }
}

// A warp owns one row of the tile, a lane VEC channels of its COLUMNS pixels. Gradient of the output: C stride 1 for
// VEC > 1. All control flow is uniform in the warp; a step loads up to 2 x 2 bins at once.
template <typename scalar_t, int VEC, int COLUMNS>
__global__ void __launch_bounds__(kBlockThreads, sizeof(scalar_t) == 8 ? 1 : 2)
    roi_align_backward_channels_kernel(const __grid_constant__ RoiAlignParams p,
                                       const __grid_constant__ BackwardPlan plan) {
  using T = opmath_t<scalar_t>;
  constexpr int kRows = kWarps;
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize;
  const Tile tile = find_tile(p, plan, kRows, COLUMNS, kWarpSize * VEC);
  const int64_t c = tile.c + lane * VEC;
  const scalar_t* const pooled = static_cast<const scalar_t*>(p.pooled) + min_of(c, p.C - 1) * p.pooled_stride[1];
  T sum[COLUMNS][VEC] = {};

  for_each_roi<T, kRows, COLUMNS>(p, tile, [&](const RoiLines<T, kRows, COLUMNS>& lines, int64_t k) {
    const Line<T>& y = lines.row[row];
    if (y.count == 0 || c >= p.C) return;
    const scalar_t* const bins = pooled + k * p.pooled_stride[0] + y.offset;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      const Line<T>& x = lines.column[i];
      for (int by = 0; by < y.count; by += 2) {
        for (int bx = 0; bx < x.count; bx += 2) {
          VecN<scalar_t, VEC> loaded[4];
          T weight[4];
          const scalar_t* const bin = bins + x.offset + by * p.pooled_stride[2] + bx * p.pooled_stride[3];
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            weight[u] = y.weight[by + u / 2] * x.weight[bx + u % 2];
            loaded[u] = {};
            if (weight[u] == T(0)) continue;
            loaded[u] = load_vec<VEC>(bin + u / 2 * p.pooled_stride[2] + u % 2 * p.pooled_stride[3]);
          }
#pragma unroll
          for (int u = 0; u < 4; ++u) {
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum[i][e] += weight[u] * to_opmath(loaded[u].data[e]);
          }
        }
      }
    }
  });

  const Level& level = p.levels[tile.level];
  if (tile.y + row >= level.H) return;
  scalar_t* const map =
      static_cast<scalar_t*>(level.map) + tile.image * level.stride[0] + (tile.y + row) * level.stride[2];
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    if (tile.x + i >= level.W || c >= p.C) continue;
    scalar_t* const pixel = map + (tile.x + i) * level.stride[3];
    VecN<scalar_t, VEC> result;
#pragma unroll
    for (int e = 0; e < VEC; ++e) result.data[e] = from_opmath<scalar_t>(sum[i][e]);
    if (plan.vector_store) {
      store_vec(pixel + c, result);
    } else {
#pragma unroll
      for (int e = 0; e < VEC; ++e) pixel[(c + e) * level.stride[1]] = result.data[e];
    }
  }
}

// A thread owns one pixel of a 16 x 16 tile and CHANNELS channels of it, so that neighbouring lanes read neighbouring
// bins and write neighbouring pixels. Any strides, fastest where W and PW have stride 1.
template <typename scalar_t, int CHANNELS>
__global__ void __launch_bounds__(kBlockThreads, sizeof(scalar_t) == 8 ? 1 : 2)
    roi_align_backward_pixels_kernel(const __grid_constant__ RoiAlignParams p,
                                     const __grid_constant__ BackwardPlan plan) {
  using T = opmath_t<scalar_t>;
  constexpr int kSide = 16, kLoads = 8;
  static_assert(kSide * kSide == kBlockThreads);
  const Tile tile = find_tile(p, plan, kSide, kSide, CHANNELS);
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  const int channels = int(min_of(p.C - tile.c, int64_t(CHANNELS)));
  const scalar_t* const pooled = static_cast<const scalar_t*>(p.pooled) + tile.c * p.pooled_stride[1];
  T sum[CHANNELS] = {};

  for_each_roi<T, kSide, kSide>(p, tile, [&](const RoiLines<T, kSide, kSide>& lines, int64_t k) {
    const Line<T>& y = lines.row[row];
    const Line<T>& x = lines.column[column];
    const scalar_t* const bins = pooled + k * p.pooled_stride[0] + y.offset + x.offset;
#pragma unroll 1
    for (int by = 0; by < y.count; ++by) {
#pragma unroll 1
      for (int bx = 0; bx < x.count; ++bx) {
        const T weight = y.weight[by] * x.weight[bx];
        if (weight == T(0)) continue;
        // Past the last channel it repeats that one.
        const scalar_t* bin = bins + by * p.pooled_stride[2] + bx * p.pooled_stride[3];
#pragma unroll
        for (int u = 0; u < CHANNELS; u += kLoads) {
          T loaded[kLoads];
#pragma unroll
          for (int i = 0; i < kLoads; ++i) {
            loaded[i] = to_opmath(__ldg(bin));
            if (u + i + 1 < channels) bin += p.pooled_stride[1];
          }
#pragma unroll
          for (int i = 0; i < kLoads; ++i) sum[u + i] += weight * loaded[i];
        }
      }
    }
  });

  const Level& level = p.levels[tile.level];
  if (tile.y + row >= level.H || tile.x + column >= level.W) return;
  scalar_t* const pixel = static_cast<scalar_t*>(level.map) + tile.image * level.stride[0] + tile.c * level.stride[1] +
                          (tile.y + row) * level.stride[2] + (tile.x + column) * level.stride[3];
#pragma unroll
  for (int u = 0; u < CHANNELS; ++u) {
    if (u < channels) pixel[u * level.stride[1]] = from_opmath<scalar_t>(sum[u]);
  }
}

}  // namespace pvk::roi_align
