// RoI max pooling on CUDA, gradient of the map without atomics: a lane adds to pixels that no other lane has.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/roi_pool/forward.cuh"
#include "ops/roi_pool/roi_pool.h"

namespace pvk::roi_pool {

constexpr int kBackwardWarps = 4;
constexpr int kBackwardThreads = kBackwardWarps * kWarpSize;

// The first and the last of up to 32 successive items that hold, one a lane; empty where end <= begin.
PVK_DEVICE PixelRange range_of(bool holds) {
  const unsigned mask = ballot(holds);
  return {mask == 0 ? 0 : __ffs(int(mask)) - 1, 32 - __clz(int(mask))};
}

PVK_DEVICE bool overlap(const PixelRange& a, const PixelRange& b) {
  return a.begin < b.end && b.begin < a.end && a.begin < a.end;
}

// A warp owns ROWS x COLUMNS pixels and 32 channels of one image, a lane one channel of them, summed in shared memory.
// RoIs and bins that touch the tile are visited in ascending order: the sums are those of the CPU, bit for bit. Any
// strides; reads are coalesced where the pooled tensors have C stride 1, else a lane's bins are neighbours.
template <typename scalar_t, int ROWS, int COLUMNS>
__global__ void __launch_bounds__(kBackwardThreads, 4)
    roi_pool_backward_kernel(const __grid_constant__ RoiPoolParams p, int64_t tiles) {
  using T = opmath_t<scalar_t>;
  constexpr int kPixels = ROWS * COLUMNS, kLoads = 4;
  SIMT_SHARED(T[kBackwardWarps][kPixels][kWarpSize + 1], tile_sums);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int64_t index = int64_t(blockIdx.x) * kBackwardWarps + warp;
  if (index >= tiles) return;
  T(&sums)[kPixels][kWarpSize + 1] = tile_sums[warp];
  const int64_t chunks = ceil_div(p.C, int64_t(kWarpSize)), across = ceil_div(p.W, int64_t(COLUMNS));
  const int64_t c0 = index % chunks * kWarpSize, c = min_of(c0 + lane, p.C - 1);
  index /= chunks;
  const int64_t x0 = index % across * COLUMNS;
  index /= across;
  const int64_t down = ceil_div(p.H, int64_t(ROWS)), y0 = index % down * ROWS, image = index / down;
  const PixelRange rows{y0, min_of(y0 + ROWS, p.H)}, columns{x0, min_of(x0 + COLUMNS, p.W)};
  const scalar_t* const pooled = static_cast<const scalar_t*>(p.pooled) + c * p.pooled_stride[1];
  const int32_t* const argmax = p.argmax + c * p.argmax_stride[1];
  const unsigned W = unsigned(p.W), corner = unsigned(y0 * p.W);
#pragma unroll
  for (int i = 0; i < kPixels; ++i) sums[i][lane] = T(0);

  const auto add_row = [&](int64_t k, int64_t ph, int64_t pw_begin, int64_t pw_end) {
    const int64_t places = k * p.argmax_stride[0] + ph * p.argmax_stride[2];
    const scalar_t* const gradients = pooled + k * p.pooled_stride[0] + ph * p.pooled_stride[2];
    for (int64_t pw = pw_begin; pw < pw_end; pw += kLoads) {
      int32_t place[kLoads];
      scalar_t gradient[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        place[u] = pw + u < pw_end ? __ldg(argmax + places + (pw + u) * p.argmax_stride[3]) : -1;
        if (place[u] >= 0) gradient[u] = __ldg(gradients + (pw + u) * p.pooled_stride[3]);
      }
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const unsigned below = unsigned(place[u]) - corner;  // wraps where the place is above the tile
        const unsigned row = below / W, column = below - row * W - unsigned(x0);
        if (place[u] >= 0 && row < ROWS && column < COLUMNS)
          sums[row * COLUMNS + column][lane] += to_opmath(gradient[u]);
      }
    }
  };

  for (int64_t k0 = 0; k0 < p.K; k0 += kWarpSize) {
    bool hit = false;
    if (k0 + lane < p.K) {
      const Roi<T> roi = load_roi<T>(p, k0 + lane);
      hit = roi.image == image &&
            overlap({bin_range(roi.y, 0, p.H).begin, bin_range(roi.y, p.PH - 1, p.H).end}, rows) &&
            overlap({bin_range(roi.x, 0, p.W).begin, bin_range(roi.x, p.PW - 1, p.W).end}, columns);
    }
    for (unsigned hits = ballot(hit); hits != 0; hits &= hits - 1) {
      const int64_t k = k0 + __ffs(int(hits)) - 1;
      const Roi<T> roi = load_roi<T>(p, k);
      for (int64_t ph0 = 0; ph0 < p.PH; ph0 += kWarpSize) {
        const PixelRange ph = range_of(ph0 + lane < p.PH && overlap(bin_range(roi.y, ph0 + lane, p.H), rows));
        if (ph.end <= ph.begin) continue;
        for (int64_t h = ph0 + ph.begin; h < ph0 + ph.end; ++h) {
          for (int64_t pw0 = 0; pw0 < p.PW; pw0 += kWarpSize) {
            const PixelRange pw = range_of(pw0 + lane < p.PW && overlap(bin_range(roi.x, pw0 + lane, p.W), columns));
            add_row(k, h, pw0 + pw.begin, pw0 + pw.end);
          }
        }
      }
    }
  }

  sync_warp();
  scalar_t* const map = static_cast<scalar_t*>(p.map) + image * p.map_stride[0];
  for (int i = lane; i < kPixels * kWarpSize; i += kWarpSize) {
    const int pixel = p.channels_last ? i / kWarpSize : i % kPixels;
    const int channel = p.channels_last ? i % kWarpSize : i / kPixels;
    const int64_t y = y0 + pixel / COLUMNS, x = x0 + pixel % COLUMNS;
    if (y >= p.H || x >= p.W || c0 + channel >= p.C) continue;
    map[(c0 + channel) * p.map_stride[1] + y * p.map_stride[2] + x * p.map_stride[3]] =
        from_opmath<scalar_t>(sums[pixel][channel]);
  }
}

}  // namespace pvk::roi_pool
