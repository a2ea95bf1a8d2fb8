// Depthwise convolution of contiguous maps, or of any strides: neighbouring threads along the columns.
#pragma once

#include "ops/conv2d/depthwise.cuh"

namespace pvk::conv2d {
namespace {

struct PlanesPlan {
  int64_t strips_w, strips;  // in a row of strips, in a plane
  int64_t threads;           // of a plane; each has every threads-th strip
  int64_t count;             // of all planes
  int64_t multiplier;        // outputs of an input
};

// A thread owns strips of 4 (or 2) x 2 outputs of a plane, and goes down the rows of the input: a row's window is in
// registers, and serves all outputs that read it. The plane's taps are in registers. Any strides; sums in float32.
// Threads go along strips and planes alike, so that small planes leave no lane idle.
template <typename scalar_t, int K, int STEP, int SPREAD>
__global__ void __launch_bounds__(kPlaneThreads, plane_blocks(K))
    conv2d_depthwise_planes_kernel(const __grid_constant__ DepthwiseParams p, const __grid_constant__ PlanesPlan plan) {
  using T = opmath_t<scalar_t>;
  constexpr int kPlaneRows = plane_rows(K, STEP);
  using Rows = Window<K, STEP, SPREAD, kPlaneRows>;
  using Columns = Window<K, STEP, SPREAD, kPlaneColumns>;
  const int64_t thread = int64_t(blockIdx.x) * kPlaneThreads + threadIdx.x;
  if (thread >= plan.count) return;
  const int64_t plane = quotient(thread, plan.threads), n = quotient(plane, p.K), k = plane - n * p.K;
  const int H = int(p.H), W = int(p.W), top = int(p.padding_top), left = int(p.padding_left);
  const scalar_t* const map =
      static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] + quotient(k, plan.multiplier) * p.input_stride[1];
  const scalar_t* const weight = static_cast<const scalar_t*>(p.weight) + k * p.weight_stride[0];
  scalar_t* const out = static_cast<scalar_t*>(p.output) + n * p.output_stride[0] + k * p.output_stride[1];
  T taps[K * K];
#pragma unroll
  for (int i = 0; i < K * K; ++i)
    taps[i] = to_opmath(__ldg(weight + i / K * p.weight_stride[2] + i % K * p.weight_stride[3]));
  Epilogue<scalar_t, 1> epilogue;
  epilogue.load(p, k);

  for (int64_t strip = thread - plane * plan.threads; strip < plan.strips; strip += plan.threads) {
    const int64_t band = quotient(strip, plan.strips_w);
    const int oh0 = int(band) * kPlaneRows - int(Rows::lead(top));
    const int ow0 = int(strip - band * plan.strips_w) * kPlaneColumns - int(Columns::lead(left));
    const int first_row = (oh0 * STEP - top) / SPREAD, first_column = (ow0 * STEP - left) / SPREAD;
    T sum[kPlaneRows][kPlaneColumns];
#pragma unroll
    for (int i = 0; i < kPlaneRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPlaneColumns; ++j) sum[i][j] = T(0);
    }
#pragma unroll
    for (int y = 0; y < Rows::kSize; ++y) {
      const int h = first_row + y;
      T window[Columns::kSize];
#pragma unroll
      for (int x = 0; x < Columns::kSize; ++x) {
        const int w = first_column + x;
        window[x] = T(0);
        if (h >= 0 && h < H && w >= 0 && w < W)
          window[x] = to_opmath(__ldg(map + h * p.input_stride[2] + w * p.input_stride[3]));
      }
#pragma unroll
      for (int i = 0; i < kPlaneRows; ++i) {
        const int r = y * SPREAD - i * STEP;  // the tap through which output row i reads this row
        if (r < 0 || r >= K) continue;
#pragma unroll
        for (int s = 0; s < K; ++s) {
#pragma unroll
          for (int j = 0; j < kPlaneColumns; ++j)
            if (Columns::reads(j, s)) sum[i][j] = fma(window[Columns::place(j, s)], taps[r * K + s], sum[i][j]);
        }
      }
    }
    const bool at_edge =
        first_row < 0 || first_row + Rows::kSize > H || first_column < 0 || first_column + Columns::kSize > W;
#pragma unroll 1
    for (int i = 0; i < kPlaneRows; ++i) {  // of sum[0]: the others move up
      const int oh = oh0 + i;
      T value[kPlaneColumns] = {};
#pragma unroll
      for (int j = 0; j < kPlaneColumns; ++j) {
        const int ow = ow0 + j;
        if (oh < 0 || oh >= p.OH || ow < 0 || ow >= p.OW) continue;
        T one[1] = {sum[0][j]};
        if (at_edge && !all_finite(one)) {
          one[0] = T(0);
#pragma unroll 1
          for (int t = 0; t < K * K; ++t) {
            const int y = oh * STEP - top + t / K, x = ow * STEP - left + t % K, h = y / SPREAD, w = x / SPREAD;
            if (y < 0 || x < 0 || h >= H || w >= W || (SPREAD == 2 && ((y | x) & 1) != 0)) continue;
            one[0] = fma(to_opmath(__ldg(map + h * p.input_stride[2] + w * p.input_stride[3])),
                         to_opmath(__ldg(weight + t / K * p.weight_stride[2] + t % K * p.weight_stride[3])), one[0]);
          }
        }
        epilogue.apply(p, n, k, oh, ow, one);
        value[j] = one[0];
      }
      if (oh >= 0 && oh < p.OH) {
        scalar_t* const address = out + oh * p.output_stride[2] + ow0 * p.output_stride[3];
        const bool whole = ow0 >= 0 && ow0 + kPlaneColumns <= p.OW && p.output_stride[3] == 1;
        if (whole && reinterpret_cast<uintptr_t>(address) % (kPlaneColumns * sizeof(scalar_t)) == 0) {
          store_rounded<scalar_t, kPlaneColumns>(address, value);
        } else {
#pragma unroll
          for (int j = 0; j < kPlaneColumns; ++j)
            if (ow0 + j >= 0 && ow0 + j < p.OW) address[j * p.output_stride[3]] = from_opmath<scalar_t>(value[j]);
        }
      }
#pragma unroll
      for (int m = 0; m + 1 < kPlaneRows; ++m) {
#pragma unroll
        for (int j = 0; j < kPlaneColumns; ++j) sum[m][j] = sum[m + 1][j];
      }
    }
  }
}

template <typename scalar_t, int K, int STEP, int SPREAD>
void run_planes(const DepthwiseParams& p, Stream stream) {
  constexpr int64_t kEnough = kMultiprocessors * 1024, kMostStrips = 4;  // of a thread: they share its taps
  PlanesPlan plan{};
  plan.strips_w = Window<K, STEP, SPREAD, kPlaneColumns>::strips(p.OW, p.padding_left);
  plan.strips = plan.strips_w * Window<K, STEP, SPREAD, plane_rows(K, STEP)>::strips(p.OH, p.padding_top);
  plan.multiplier = p.K / p.groups;
  const int64_t planes = p.N * p.K;
  plan.threads = ceil_div(plan.strips, min_of(max_of(planes * plan.strips / kEnough, int64_t(1)), kMostStrips));
  plan.count = planes * plan.threads;
  const int64_t blocks = ceil_div(plan.count, int64_t(kPlaneThreads));
  launch(conv2d_depthwise_planes_kernel<scalar_t, K, STEP, SPREAD>,
         {dim3(unsigned(blocks)), dim3(kPlaneThreads), 0, stream}, p, plan);
}

// Planes are read along their columns; a map in channels_last would be read a channel at a time.
inline bool suits_planes(const DepthwiseParams& p) {
  return p.C == p.groups && p.input_stride[1] != 1 && p.output_stride[1] != 1;
}

}  // namespace
}  // namespace pvk::conv2d
