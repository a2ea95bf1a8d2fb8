// RoI align, forward, for any strides: lanes run along the map's columns. Source: He et al., "Mask R-CNN",
// 2017, section 3; the geometry is roi_align.h's.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/roi_align/roi.cuh"
#include "ops/roi_align/roi_align.h"

namespace pvk::roi_align {

template <typename T>
constexpr int kChannels = sizeof(T) == 8 ? 4 : 8;  // channels a lane sums at once
constexpr int kSliceChannels = 32;                 // channels for which a warp works out its bins' columns once
constexpr int kRowTableTaps = 512;

// A row of the map and its weight in a row of bins.
template <typename T>
struct alignas(16) RowTap {
  int64_t offset;
  T weight;
};

// Fills rows[ph][2 * samples] with the distinct rows under bin row ph, closed by zero weights. One thread a bin row.
template <typename T>
PVK_DEVICE void build_rows(const Level& level, const RoiAxis<T>& axis, int ph, int samples, RowTap<T>* rows) {
  const int64_t stride = level.stride[2];
  rows += ph * 2 * samples;
  int n = 0;
  for (int i = 0; i < samples; ++i) {
    const Tap<T> tap = make_tap(sample_position(axis, ph, i), level.H);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int64_t offset = (side ? tap.high : tap.low) * stride;
      const T weight = side ? tap.high_weight : tap.low_weight;
      if (weight == T(0)) continue;
      if (n > 0 && rows[n - 1].offset == offset) {
        rows[n - 1].weight += weight;
      } else if (n > 1 && rows[n - 2].offset == offset) {
        rows[n - 2].weight += weight;
      } else {
        rows[n++] = {offset, weight};
      }
    }
  }
  for (; n < 2 * samples; ++n) rows[n] = {0, T(0)};
}

// sum[u] += the two rows' pixels of channel c + u, one column a lane. Past the last channel it repeats that one.
template <typename scalar_t, typename T, int CHANNELS>
PVK_DEVICE void add_rows(const scalar_t* pixel, int64_t c_stride, int channels, const RowTap<T>& a, const RowTap<T>& b,
                         T column_weight, T (&sum)[CHANNELS]) {
  const T wa = a.weight * column_weight, wb = b.weight * column_weight;
  T va[CHANNELS], vb[CHANNELS];
  const scalar_t* channel = pixel + a.offset;
  const int64_t to_b = b.offset - a.offset;
#pragma unroll
  for (int u = 0; u < CHANNELS; ++u) {
    va[u] = wa != T(0) ? to_opmath(__ldg(channel)) : T(0);
    vb[u] = wb != T(0) ? to_opmath(__ldg(channel + to_b)) : T(0);
    if (u + 1 < channels) channel += c_stride;
  }
#pragma unroll
  for (int u = 0; u < CHANNELS; ++u) sum[u] += wa * va[u] + wb * vb[u];
}

// Sums over the G lanes of a group. Each step also halves the channels that a lane keeps, so that the group ends with
// its channels spread over its lanes: lane l holds sum[0, CHANNELS / G) of channel `first` on; `first` is negative
// where l holds none.
template <int G, typename T, int CHANNELS>
PVK_DEVICE int reduce_group(T (&sum)[CHANNELS], int lane) {
  int first = 0;
#pragma unroll
  for (int mask = G / 2, keep = CHANNELS / 2; mask > 0; mask /= 2, keep /= 2) {
    const bool upper = lane & mask;
    if (keep > 0) {
#pragma unroll
      for (int u = 0; u < CHANNELS / 2; ++u) {
        if (u >= keep) continue;
        const T other = shfl_xor(upper ? sum[u] : sum[u + keep], mask);
        sum[u] = (upper ? sum[u + keep] : sum[u]) + other;
      }
      first += upper ? keep : 0;
    } else {
      sum[0] += shfl_xor(sum[0], mask);
      if (upper) first = -CHANNELS;
    }
  }
  return first;
}

// The part of a block that depends on G, the lanes a bin.
template <typename scalar_t, int G, typename T>
PVK_DEVICE void forward_bins(const RoiAlignParams& p, const Level& level, const Roi<T>& roi, int64_t k,
                             const RowTap<T>* rows, int row_samples, int64_t c_begin, int64_t c_end) {
  constexpr int kBins = kWarpSize / G;
  constexpr int kSum = kChannels<T>;
  constexpr int kHeld = G < kSum ? kSum / G : 1;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool adaptive = p.sampling_ratio <= 0;
  const int bins = int(p.PH * p.PW), PW = int(p.PW);
  const unsigned groups = ceil_div(bins, kBins);
  const unsigned items = groups * unsigned(ceil_div(c_end - c_begin, int64_t(kSliceChannels)));
  const scalar_t* const image =
      static_cast<const scalar_t*>(level.map) + max_of(roi.image, int64_t(0)) * level.stride[0];

  for (int64_t item = blockIdx.z * kWarps + warp; item < items; item += gridDim.z * kWarps) {
    const unsigned slice = unsigned(item) / groups;
    const int bin = int(unsigned(item) % groups) * kBins + lane / G;
    const bool in_range = bin < bins;
    const int ph = in_range ? bin / PW : 0, pw = in_range ? bin % PW : 0;
    const SampleRange ry = sample_range(roi.y, ph, level.H, adaptive);
    const SampleRange rx = sample_range(roi.x, pw, level.W, adaptive);
    const int64_t slice_begin = c_begin + int64_t(slice) * kSliceChannels;
    const int64_t slice_end = min_of(slice_begin + kSliceChannels, c_end);
    scalar_t* const out =
        static_cast<scalar_t*>(p.pooled) + k * p.pooled_stride[0] + ph * p.pooled_stride[2] + pw * p.pooled_stride[3];

    // This lane's column: low or high pixel of sample x0 + (lane % G) / 2.
    int64_t column;
    T column_weight;
    const auto find_column = [&](int64_t x0) {
      const int64_t sample = x0 + lane % G / 2;
      const Tap<T> tap = make_tap(sample_position(roi.x, pw, sample), level.W);
      column = (lane & 1 ? tap.high : tap.low) * level.stride[3];
      column_weight = !in_range || sample >= rx.end ? T(0) : lane & 1 ? tap.high_weight : tap.low_weight;
    };
    find_column(rx.begin);

    for (int64_t c = slice_begin; c < slice_end; c += kSum) {
      const int channels = int(min_of(slice_end - c, int64_t(kSum)));
      T sum[kSum] = {};
      for (int64_t x0 = rx.begin; x0 < rx.end; x0 += G / 2) {
        if (rx.end - rx.begin > G / 2) find_column(x0);
        const scalar_t* const pixel = image + c * level.stride[1] + column;
        if (row_samples > 0) {
#pragma unroll 1
          for (int r = ph * 2 * row_samples, end = r + 2 * row_samples; r < end && rows[r].weight != T(0); r += 2) {
            add_rows(pixel, level.stride[1], channels, rows[r], rows[r + 1], column_weight, sum);
          }
        } else {
#pragma unroll 1
          for (int64_t i = ry.begin; i < ry.end; ++i) {
            const Tap<T> tap = make_tap(sample_position(roi.y, ph, i), level.H);
            add_rows(pixel, level.stride[1], channels, RowTap<T>{tap.low * level.stride[2], tap.low_weight},
                     RowTap<T>{tap.high * level.stride[2], tap.high_weight}, column_weight, sum);
          }
        }
      }
      const int first = reduce_group<G>(sum, lane);
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        if (!in_range || first < 0 || first + u >= channels) continue;
        out[(c + first + u) * p.pooled_stride[1]] = from_opmath<scalar_t>(sum[u] * roi.inverse_count);
      }
    }
  }
}

// A block owns a RoI and a chunk of channels, a warp 32 / G bins and 32 channels at a time; the G lanes of a bin own
// the columns under it. Map: any strides, fastest where W has stride 1. G is the power of two at or above twice the
// samples a row, at most 32. Columns stay in registers; the rows of all bins are found once, in shared memory, where
// they fit. Sums in opmath_t, in a fixed order.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 2)
    roi_align_forward_pixels_kernel(const __grid_constant__ RoiAlignParams p,
                                    const __grid_constant__ ForwardPlan plan) {
  using T = opmath_t<scalar_t>;
  SIMT_SHARED(Roi<T>, roi);
  SIMT_SHARED(RowTap<T>[kRowTableTaps], rows);
  const int64_t c_begin = blockIdx.y * plan.channels;
  const int64_t c_end = min_of(c_begin + plan.channels, p.C);

  const int64_t k = blockIdx.x;
  if (threadIdx.x == 0) roi = load_roi<T>(p, k);
  __syncthreads();
  const Level& level = p.levels[roi.level];
  int row_samples = 0;
  if (roi.y.grid * T(p.PH) * T(2) <= T(kRowTableTaps)) {
    row_samples = int(roi.y.grid);
    for (int ph = threadIdx.x; ph < p.PH; ph += kBlockThreads) build_rows(level, roi.y, ph, row_samples, rows);
  }
  __syncthreads();
  if (roi.x.grid <= T(1)) {
    forward_bins<scalar_t, 2>(p, level, roi, k, rows, row_samples, c_begin, c_end);
  } else if (roi.x.grid <= T(2)) {
    forward_bins<scalar_t, 4>(p, level, roi, k, rows, row_samples, c_begin, c_end);
  } else if (roi.x.grid <= T(4)) {
    forward_bins<scalar_t, 8>(p, level, roi, k, rows, row_samples, c_begin, c_end);
  } else if (roi.x.grid <= T(8)) {
    forward_bins<scalar_t, 16>(p, level, roi, k, rows, row_samples, c_begin, c_end);
  } else {
    forward_bins<scalar_t, 32>(p, level, roi, k, rows, row_samples, c_begin, c_end);
  }
}

}  // namespace pvk::roi_align
