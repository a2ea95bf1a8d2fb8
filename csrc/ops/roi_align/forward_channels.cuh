// RoI align, forward, where the map has C stride 1: lanes run along channels. Source: He et al., "Mask R-CNN",
// 2017, section 3; the geometry is roi_align.h's.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/roi_align/roi.cuh"
#include "ops/roi_align/roi_align.h"

namespace pvk::roi_align {

// A pixel of the map and its weight in a bin.
template <typename T>
struct alignas(16) PixelTap {
  int64_t bytes;  // from the image's first pixel
  T weight;
};

constexpr int kChunkSamples = 4;              // samples per axis that one tap list covers
constexpr int kAxisTaps = 2 * kChunkSamples;  // and pixels per axis
constexpr int kListTaps = kAxisTaps * kAxisTaps;

// What a warp keeps of its bin.
template <typename T>
struct BinWork {
  SampleRange y, x;
  PixelTap<T> taps[kListTaps];
};

// Lists the distinct pixels under samples [y0, y0 + 4) x [x0, x0 + 4) of a bin, and returns how many they are.
// Lanes 0-7 find the rows, lanes 8-15 the columns; equal ones merge, which leaves (g + 1)^2 of (2 g)^2 pixels.
template <typename T>
PVK_DEVICE int build_taps(const Level& level, const Roi<T>& roi, int ph, int pw, int64_t y0, int64_t x0,
                          int64_t element_bytes, BinWork<T>& work) {
  const int lane = threadIdx.x % kWarpSize;
  const bool is_x = lane & kAxisTaps;
  const int slot = lane % kAxisTaps;
  const int64_t sample = (is_x ? x0 : y0) + slot / 2;
  const int64_t samples = (is_x ? work.x : work.y).end - (is_x ? x0 : y0);
  const Tap<T> tap = make_tap(sample_position(is_x ? roi.x : roi.y, is_x ? pw : ph, sample), is_x ? level.W : level.H);
  const bool valid = lane < 2 * kAxisTaps && slot / 2 < samples;
  const int pixel = int(slot & 1 ? tap.high : tap.low);
  const T weight = !valid ? T(0) : slot & 1 ? tap.high_weight : tap.low_weight;

  T merged = T(0);
  bool first = weight != T(0);
  const int last = int(reduce_max(valid ? slot : 0));
  for (int s = 0; s <= last; ++s) {
    const int other_pixel = shfl(pixel, lane - slot + s);
    const T other_weight = shfl(weight, lane - slot + s);
    if (other_pixel == pixel && other_weight != T(0)) {
      merged += other_weight;
      first = first && s >= slot;
    }
  }
  const unsigned found = ballot(first);
  const unsigned rows = found & 0xff, columns = found >> kAxisTaps & 0xff;
  const int num_columns = __popc(columns);
  const int64_t bytes = pixel * (level.stride[is_x ? 3 : 2] * element_bytes);

  sync_warp();  // every lane has read the list before this one
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int y_slot = half * kChunkSamples + lane / kAxisTaps;
    const int64_t y_bytes = shfl(bytes, y_slot), x_bytes = shfl(bytes, kAxisTaps + slot);
    const T y_weight = shfl(merged, y_slot), x_weight = shfl(merged, kAxisTaps + slot);
    if (rows >> y_slot & columns >> slot & 1) {
      const int rank = __popc(rows & bits_below(y_slot)) * num_columns + __popc(columns & bits_below(slot));
      work.taps[rank] = {y_bytes + x_bytes, y_weight * x_weight * roi.inverse_count};
    }
  }
  sync_warp();
  return __popc(rows) * num_columns;
}

// sum[v] += TAPS listed pixels, all their loads in flight together.
template <int TAPS, typename scalar_t, int VEC, int VECS, typename T>
PVK_DEVICE void add_taps(const scalar_t* const (&image)[VECS], const PixelTap<T>* list, T (&sum)[VECS][VEC]) {
  VecN<scalar_t, VEC> loaded[TAPS][VECS];
#pragma unroll
  for (int u = 0; u < TAPS; ++u) {
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      const char* const pixel = reinterpret_cast<const char*>(image[v]) + list[u].bytes;
      loaded[u][v] = load_vec<VEC>(reinterpret_cast<const scalar_t*>(pixel));
    }
  }
#pragma unroll
  for (int u = 0; u < TAPS; ++u) {
    const T weight = list[u].weight;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
#pragma unroll
      for (int e = 0; e < VEC; ++e) sum[v][e] += weight * to_opmath(loaded[u][v].data[e]);
    }
  }
}

// A block owns a RoI and a chunk of channels, a warp one bin at a time, a lane VECS vectors of VEC channels.
// Map: C stride 1. The warp writes the bin's distinct pixels and weights to shared memory once, then every lane
// streams its channels of those pixels with up to 8 loads in flight. Sums in opmath_t, in the order of the pixels.
template <typename scalar_t, int VEC, int VECS>
__global__ void __launch_bounds__(kBlockThreads, sizeof(scalar_t) == 8 ? 2 : 3)
    roi_align_forward_channels_kernel(const __grid_constant__ RoiAlignParams p,
                                      const __grid_constant__ ForwardPlan plan) {
  using T = opmath_t<scalar_t>;
  constexpr int kTaps = sizeof(scalar_t) == 8 ? 2 : 4;  // at once: what the registers hold
  constexpr int kPassChannels = kWarpSize * VEC * VECS;
  SIMT_SHARED(Roi<T>, roi);
  SIMT_SHARED(BinWork<T>[kWarps], works);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  BinWork<T>& work = works[warp];
  const int64_t c_begin = blockIdx.y * plan.channels;
  const int64_t c_end = min_of(c_begin + plan.channels, p.C);
  const int bins = int(p.PH * p.PW), PW = int(p.PW);

  const int64_t k = blockIdx.x;
  if (threadIdx.x == 0) roi = load_roi<T>(p, k);
  __syncthreads();
  const Level& level = p.levels[roi.level];
  for (int64_t bin = blockIdx.z * kWarps + warp; bin < bins; bin += gridDim.z * kWarps) {
    const int ph = int(bin) / PW, pw = int(bin) % PW;
    if (lane == 0) {
      work.y = sample_range(roi.y, ph, level.H, p.sampling_ratio <= 0);
      work.x = sample_range(roi.x, pw, level.W, p.sampling_ratio <= 0);
    }
    sync_warp();
    const bool one_list = work.y.end - work.y.begin <= kChunkSamples && work.x.end - work.x.begin <= kChunkSamples;
    int taps = 0;
    for (int64_t c0 = c_begin; c0 < c_end; c0 += kPassChannels) {
      const int64_t c = c0 + lane * VEC;
      T sum[VECS][VEC] = {};
      const scalar_t* image[VECS];  // a lane without channels reads others' and stores nothing
#pragma unroll
      for (int v = 0; v < VECS; ++v) {
        image[v] = static_cast<const scalar_t*>(level.map) + roi.image * level.stride[0] +
                   min_of(c + v * kWarpSize * VEC, c_end - VEC);
      }
      for (int64_t y0 = work.y.begin; y0 < work.y.end; y0 += kChunkSamples) {
        for (int64_t x0 = work.x.begin; x0 < work.x.end; x0 += kChunkSamples) {
          if (!one_list || c0 == c_begin) taps = build_taps(level, roi, ph, pw, y0, x0, sizeof(scalar_t), work);
          int t = 0;
#pragma unroll 1
          for (; t + kTaps <= taps; t += kTaps) add_taps<kTaps>(image, work.taps + t, sum);
#pragma unroll 1
          for (; t < taps; ++t) add_taps<1>(image, work.taps + t, sum);
        }
      }

      scalar_t* const out = static_cast<scalar_t*>(p.pooled) + k * p.pooled_stride[0] + ph * p.pooled_stride[2] +
                            pw * p.pooled_stride[3] + c * p.pooled_stride[1];
#pragma unroll
      for (int v = 0; v < VECS; ++v) {
        if (c + v * kWarpSize * VEC >= c_end) continue;
        VecN<scalar_t, VEC> result;
#pragma unroll
        for (int e = 0; e < VEC; ++e) result.data[e] = from_opmath<scalar_t>(sum[v][e]);
        if (plan.vector_store) {
          store_vec(out + v * kWarpSize * VEC, result);
        } else {
#pragma unroll
          for (int e = 0; e < VEC; ++e) out[(v * kWarpSize * VEC + e) * p.pooled_stride[1]] = result.data[e];
        }
      }
    }
    sync_warp();  // the next bin overwrites `work`
  }
}

}  // namespace pvk::roi_align
