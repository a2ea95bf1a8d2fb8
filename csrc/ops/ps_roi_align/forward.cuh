// Position-sensitive RoI align and pool, forward: the weights of a RoI once, in shared memory, for all its channels.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/ps_roi_align/ps_roi_align.h"
#include "ops/ps_roi_align/roi.cuh"

namespace pvk::ps_roi_align {

constexpr int kTableTaps = 512;  // of an axis
constexpr int kLoads = 4;        // columns whose loads are in flight together

// The taps of all bins of an axis, `pitch` a bin: those with a weight first, one a pixel, then zeros. Without a pitch
// there are more than fit.
template <typename T>
struct TapTable {
  int pitch;
  int64_t offset[kTableTaps];
  T weight[kTableTaps];
};

template <typename T>
PVK_DEVICE int table_pitch(const PsRoiParams& p, const RoiAxis<T>& axis, int64_t bins, int64_t size) {
  const int64_t pitch = ceil_div(max_of(most_taps(p, axis, size), int64_t(1)), int64_t(kLoads)) * kLoads;
  return pitch <= kTableTaps && pitch * bins <= kTableTaps ? int(pitch) : 0;
}

// Fills the line of bin b. Samples come in order along the axis, so that only neighbours share a pixel.
template <typename T>
PVK_DEVICE void build_line(const PsRoiParams& p, const RoiAxis<T>& axis, int b, int64_t size, int64_t stride,
                           TapTable<T>& table) {
  int64_t* const offset = table.offset + b * table.pitch;
  T* const weight = table.weight + b * table.pitch;
  int count = 0;
  for_each_tap(p, axis, b, size, [&](int64_t pixel, T value) {
    if (value == T(0)) return;
    for (int i = count - 1; i >= 0 && i >= count - 2; --i) {
      if (offset[i] != pixel * stride) continue;
      weight[i] += value;
      return;
    }
    if (count == table.pitch) return;
    offset[count] = pixel * stride;
    weight[count++] = value;
  });
  for (int i = count; i < table.pitch; ++i) {
    offset[i] = 0;
    weight[i] = T(0);
  }
}

// The sum over a bin of a plane, by its lines in the tables.
template <typename T, typename scalar_t>
PVK_DEVICE T sum_by_tables(const scalar_t* plane, const TapTable<T>& rows, int ph, const TapTable<T>& columns, int pw) {
  T sum = T(0);
  for (int i = ph * rows.pitch, row_end = i + rows.pitch; i < row_end && rows.weight[i] != T(0); ++i) {
    const scalar_t* const row = plane + rows.offset[i];
    T row_sum = T(0);
    for (int j = pw * columns.pitch, end = j + columns.pitch; j < end && columns.weight[j] != T(0); j += kLoads) {
      T value[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u)
        value[u] = columns.weight[j + u] != T(0) ? to_opmath(__ldg(row + columns.offset[j + u])) : T(0);
#pragma unroll
      for (int u = 0; u < kLoads; ++u) row_sum += columns.weight[j + u] * value[u];
    }
    sum += rows.weight[i] * row_sum;
  }
  return sum;
}

// The same sample by sample, for boxes with more taps than a table holds.
template <typename T, typename scalar_t>
PVK_DEVICE T sum_by_samples(const PsRoiParams& p, const scalar_t* plane, const Roi<T>& roi, int ph, int pw) {
  T sum = T(0);
  for_each_tap(p, roi.y, ph, p.H, [&](int64_t y, T row_weight) {
    if (row_weight == T(0)) return;
    const scalar_t* const row = plane + y * p.map_stride[2];
    T row_sum = T(0);
    for_each_tap(p, roi.x, pw, p.W, [&](int64_t x, T weight) {
      if (weight != T(0)) row_sum += weight * to_opmath(__ldg(row + x * p.map_stride[3]));
    });
    sum += row_weight * row_sum;
  });
  return sum;
}

// A block owns a RoI and a chunk of planes, a thread every 256th plane: neighbours write neighbours of the output.
// Map: any strides. Sums in opmath_t, in a fixed order; one division by the number of samples or pixels.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 3)
    ps_roi_align_forward_kernel(const __grid_constant__ PsRoiParams p, int chunk) {
  using T = opmath_t<scalar_t>;
  SIMT_SHARED(Roi<T>, roi);
  SIMT_SHARED(TapTable<T>, rows);
  SIMT_SHARED(TapTable<T>, columns);
  const int64_t k = blockIdx.x;
  if (threadIdx.x == 0) {
    roi = load_roi<T>(p, k);
    rows.pitch = table_pitch(p, roi.y, p.PH, p.H);
    columns.pitch = table_pitch(p, roi.x, p.PW, p.W);
  }
  __syncthreads();
  const bool by_tables = rows.pitch > 0 && columns.pitch > 0;
  if (by_tables) {
    for (int b = threadIdx.x; b < p.PH + p.PW; b += kBlockThreads) {
      if (b < p.PH) {
        build_line(p, roi.y, b, p.H, p.map_stride[2], rows);
      } else {
        build_line(p, roi.x, b - int(p.PH), p.W, p.map_stride[3], columns);
      }
    }
  }
  __syncthreads();

  const scalar_t* const image = static_cast<const scalar_t*>(p.map) + max_of(roi.image, int64_t(0)) * p.map_stride[0];
  scalar_t* const out = static_cast<scalar_t*>(p.pooled) + k * p.pooled_stride[0];
  const int begin = int(blockIdx.y) * chunk, end = int(min_of(begin + int64_t(chunk), p.C * p.PH * p.PW));
  for (int index = begin + int(threadIdx.x); index < end; index += kBlockThreads) {
    const Plane plane = find_plane(p, index);
    const scalar_t* const pixels = image + index * p.map_stride[1];
    T sum = T(0);
    if (roi.image >= 0) {
      sum = by_tables ? sum_by_tables(pixels, rows, plane.ph, columns, plane.pw)
                      : sum_by_samples(p, pixels, roi, plane.ph, plane.pw);
    }
    const T divisor = divisor_of(p, roi.y, plane.ph, p.H) * divisor_of(p, roi.x, plane.pw, p.W);
    out[plane.c * p.pooled_stride[1] + plane.ph * p.pooled_stride[2] + plane.pw * p.pooled_stride[3]] =
        from_opmath<scalar_t>(sum / divisor);
  }
}

}  // namespace pvk::ps_roi_align
