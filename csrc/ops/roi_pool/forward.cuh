// RoI max pooling on CUDA, forward: a block owns a RoI, for channels that are adjacent and for any strides.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/roi_pool/roi_pool.h"

namespace pvk::roi_pool {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / kWarpSize;

// RoI k; `image` is -1 where it has no result.
template <typename T>
PVK_DEVICE Roi<T> load_roi(const RoiPoolParams& p, int64_t k) {
  T box[5];
  load_strided(p.boxes, p.boxes_dtype, k * p.boxes_stride[0], p.boxes_stride[1], box);
  return make_roi<T>(p, box[0], box[1], box[2], box[3], box[4]);
}

// The pixels under one bin; a RoI without a result has none.
struct Bin {
  PixelRange rows, columns;
};

template <typename T>
PVK_DEVICE Bin find_bin(const RoiPoolParams& p, const Roi<T>& roi, int64_t ph, int64_t pw) {
  if (roi.image < 0) return {{0, 0}, {0, 0}};
  return {bin_range(roi.y, ph, p.H), bin_range(roi.x, pw, p.W)};
}

PVK_DEVICE bool is_empty(const Bin& bin) {
  return bin.rows.end <= bin.rows.begin || bin.columns.end <= bin.columns.begin;
}

// Channels of one bin: the largest value so far, and where it is. The first of equal values wins; NaN never does.
template <typename T, int N>
struct Maxima {
  T best[N];
  int32_t place[N];

  PVK_DEVICE explicit Maxima(bool empty) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      best[i] = empty ? T(0) : T(kLowest);
      place[i] = -1;
    }
  }
  PVK_DEVICE void add(int i, T value, int32_t here) {
    if (value > best[i]) {
      best[i] = value;
      place[i] = here;
    }
  }
};

// A block owns a RoI and `channels` channels, a warp one bin at a time, a lane VEC channels. Map: C stride 1.
// Loads of up to four columns are in flight; `vector_store`: the outputs have C stride 1 too.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 2)
    roi_pool_forward_channels_kernel(const __grid_constant__ RoiPoolParams p, int64_t channels, bool vector_store) {
  using T = opmath_t<scalar_t>;
  constexpr int kLoads = 4;
  SIMT_SHARED(Roi<T>, roi);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t k = blockIdx.x, c_begin = blockIdx.y * channels, c_end = min_of(c_begin + channels, p.C);
  if (threadIdx.x == 0) roi = load_roi<T>(p, k);
  __syncthreads();
  const int bins = int(p.PH * p.PW), PW = int(p.PW);
  const scalar_t* const image = static_cast<const scalar_t*>(p.map) + max_of(roi.image, int64_t(0)) * p.map_stride[0];

  for (int64_t b = int64_t(blockIdx.z) * kWarps + warp; b < bins; b += int64_t(gridDim.z) * kWarps) {
    const int ph = int(b) / PW, pw = int(b) % PW;
    const Bin bin = find_bin(p, roi, ph, pw);
    const int64_t offset = k * p.pooled_stride[0] + ph * p.pooled_stride[2] + pw * p.pooled_stride[3];
    for (int64_t c = c_begin + lane * VEC; c < c_end; c += kWarpSize * VEC) {
      Maxima<T, VEC> maxima(is_empty(bin));
      for (int64_t y = bin.rows.begin; y < bin.rows.end; ++y) {
        const scalar_t* const row = image + y * p.map_stride[2] + c;
        const int32_t first = int32_t(y * p.W);
        for (int64_t x = bin.columns.begin; x < bin.columns.end; x += kLoads) {
          VecN<scalar_t, VEC> value[kLoads];
#pragma unroll
          for (int u = 0; u < kLoads; ++u)
            if (x + u < bin.columns.end) value[u] = load_vec<VEC>(row + (x + u) * p.map_stride[3]);
#pragma unroll
          for (int u = 0; u < kLoads; ++u) {
            if (x + u >= bin.columns.end) continue;
#pragma unroll
            for (int e = 0; e < VEC; ++e) maxima.add(e, to_opmath(value[u].data[e]), first + int32_t(x + u));
          }
        }
      }
      scalar_t* const out = static_cast<scalar_t*>(p.pooled) + offset + c * p.pooled_stride[1];
      int32_t* const argmax = p.argmax + offset + c * p.pooled_stride[1];
      VecN<scalar_t, VEC> result;
#pragma unroll
      for (int e = 0; e < VEC; ++e) result.data[e] = from_opmath<scalar_t>(maxima.best[e]);
      if (VEC % 4 == 0 && vector_store) {
        store_vec(out, result);
#pragma unroll
        for (int e = 0; e + 4 <= VEC; e += 4) {
          const VecN<int32_t, 4> places{maxima.place[e], maxima.place[e + 1], maxima.place[e + 2], maxima.place[e + 3]};
          store_vec(argmax + e, places);
        }
      } else {
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          out[e * p.pooled_stride[1]] = result.data[e];
          argmax[e * p.pooled_stride[1]] = maxima.place[e];
        }
      }
    }
  }
}

// A block owns a RoI and, chunk after chunk, `groups` groups of CHANNELS channels; a thread one bin of one group, so
// that neighbouring threads read neighbouring columns and write neighbouring bins. Any strides; the loads of a pixel's
// channels are in flight together.
template <typename scalar_t, int CHANNELS>
__global__ void __launch_bounds__(kBlockThreads, 2)
    roi_pool_forward_pixels_kernel(const __grid_constant__ RoiPoolParams p, int64_t groups) {
  using T = opmath_t<scalar_t>;
  SIMT_SHARED(Roi<T>, roi);
  const int64_t k = blockIdx.x;
  if (threadIdx.x == 0) roi = load_roi<T>(p, k);
  __syncthreads();
  const unsigned bins = unsigned(p.PH * p.PW), PW = unsigned(p.PW);
  const scalar_t* const image = static_cast<const scalar_t*>(p.map) + max_of(roi.image, int64_t(0)) * p.map_stride[0];

  for (int64_t chunk = blockIdx.y * groups * CHANNELS; chunk < p.C; chunk += gridDim.y * groups * CHANNELS) {
    const unsigned items = bins * unsigned(min_of(ceil_div(p.C - chunk, int64_t(CHANNELS)), groups));
    for (unsigned item = threadIdx.x; item < items; item += kBlockThreads) {
      const unsigned b = item % bins, ph = b / PW, pw = b % PW;
      const int64_t c = chunk + int64_t(item / bins) * CHANNELS;
      const int in_range = int(min_of(p.C - c, int64_t(CHANNELS)));
      const Bin bin = find_bin(p, roi, ph, pw);
      Maxima<T, CHANNELS> maxima(is_empty(bin));
      for (int64_t y = bin.rows.begin; y < bin.rows.end; ++y) {
        const scalar_t* const row = image + c * p.map_stride[1] + y * p.map_stride[2];
        const int32_t first = int32_t(y * p.W);
#pragma unroll 1
        for (int64_t x = bin.columns.begin; x < bin.columns.end; ++x) {
          const scalar_t* pixel = row + x * p.map_stride[3];
          scalar_t value[CHANNELS];
#pragma unroll
          for (int u = 0; u < CHANNELS; ++u) {  // past the last channel it repeats that one
            value[u] = __ldg(pixel);
            if (u + 1 < in_range) pixel += p.map_stride[1];
          }
#pragma unroll
          for (int u = 0; u < CHANNELS; ++u) maxima.add(u, to_opmath(value[u]), first + int32_t(x));
        }
      }
      const int64_t offset =
          k * p.pooled_stride[0] + c * p.pooled_stride[1] + ph * p.pooled_stride[2] + pw * p.pooled_stride[3];
#pragma unroll
      for (int u = 0; u < CHANNELS; ++u) {
        if (u >= in_range) continue;
        static_cast<scalar_t*>(p.pooled)[offset + u * p.pooled_stride[1]] = from_opmath<scalar_t>(maxima.best[u]);
        p.argmax[offset + u * p.pooled_stride[1]] = maxima.place[u];
      }
    }
  }
}

}  // namespace pvk::roi_pool
