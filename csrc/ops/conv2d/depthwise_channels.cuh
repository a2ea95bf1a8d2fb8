// Depthwise convolution of channels_last maps: vectors along the channels.
#pragma once

#include "ops/conv2d/depthwise.cuh"

namespace pvk::conv2d {
namespace {

// How a launch is cut. A block owns `lanes` vectors of channels, and tiles of rows x columns strips.
struct ChannelsPlan {
  int lanes, columns, rows;
  int64_t chunks;   // of channels
  int64_t strips;   // in a row of outputs
  int64_t tiles_w;  // in a row
  int64_t tiles_h;
  int64_t tiles;
  int64_t blocks;  // that share the tiles of a chunk
  int threads;
};

// Threads of a block at most, and blocks that a multiprocessor has registers for: wide windows take more of them.
constexpr bool has_wide_window(int taps, int step, int outputs) {
  return outputs >= 4 && taps + (outputs - 1) * step > 8;
}
constexpr int channels_threads(int taps, int step, int outputs) {
  return has_wide_window(taps, step, outputs) ? 128 : 256;
}

// A thread owns VEC channels of a strip of TW outputs of a row, and goes over the rows of K taps: a row's window is in
// registers, and serves all outputs of the strip. channels_last; sums in float32. A block's taps, and what follows the
// sums, are in shared memory. Neighbouring threads have neighbouring channels, then strips; a block's tile is
// two-dimensional, so that L1 serves the rows that its strips share.
template <typename scalar_t, int VEC, int K, int STEP, int SPREAD, int TW>
__global__ void __launch_bounds__(channels_threads(K, STEP, TW), has_wide_window(K, STEP, TW) ? 3 : 2)
    conv2d_depthwise_channels_kernel(const __grid_constant__ DepthwiseParams p,
                                     const __grid_constant__ ChannelsPlan plan) {
  using T = opmath_t<scalar_t>;
  using Columns = Window<K, STEP, SPREAD, TW>;
  constexpr int kRowsAtOnce = K == 3 && TW < 4 ? ceil_div(K, SPREAD) : 1;  // all loads of a short strip in flight
  using After = Epilogue<scalar_t, VEC>;
  SIMT_DYN_SHARED(scalar_t, taps);
  const int lane = int(threadIdx.x) % plan.lanes, slot = int(threadIdx.x) / plan.lanes;
  const int column = slot % plan.columns, row = slot / plan.columns;
  const int64_t own_tile = quotient(blockIdx.x, plan.chunks);
  const int64_t first = (blockIdx.x - own_tile * plan.chunks) * plan.lanes * VEC;
  const int channels = int(min_of(int64_t(plan.lanes) * VEC, p.C - first));
  const int pitch = (plan.lanes | 1) * VEC;  // an odd number of vectors: taps of a channel lie in different banks
  for (int i = int(threadIdx.x); i < channels * K * K; i += int(blockDim.x)) {
    const int c = i / (K * K), tap = i % (K * K);
    taps[tap * pitch + c] = __ldg(static_cast<const scalar_t*>(p.weight) + (first + c) * p.weight_stride[0] +
                                  tap / K * p.weight_stride[2] + tap % K * p.weight_stride[3]);
  }
  After* const after = reinterpret_cast<After*>(taps + K * K * pitch) + lane;
  const int64_t k = first + lane * VEC;
  if (slot == 0 && lane * VEC < channels) after->load(p, k);
  __syncthreads();
  if (lane * VEC >= channels || row >= plan.rows) return;

  const int H = int(p.H), W = int(p.W), left = int(p.padding_left);
  const scalar_t* const own = taps + lane * VEC;
  for (int64_t tile = own_tile; tile < plan.tiles; tile += plan.blocks) {
    const int64_t band = quotient(tile, plan.tiles_w), n = quotient(band, plan.tiles_h);
    const int strip = int(tile - band * plan.tiles_w) * plan.columns + column;
    const int oh = int(band - n * plan.tiles_h) * plan.rows + row;
    if (oh >= p.OH || strip >= plan.strips) continue;
    const int ow0 = strip * TW - int(Columns::lead(left)), begin = (ow0 * STEP - left) / SPREAD;
    const int top = oh * STEP - int(p.padding_top);
    const scalar_t* const map = static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] + k;
    T sum[TW][VEC];
#pragma unroll
    for (int j = 0; j < TW; ++j) {
#pragma unroll
      for (int e = 0; e < VEC; ++e) sum[j][e] = T(0);
    }
#pragma unroll kRowsAtOnce
    for (int i = 0; i < ceil_div(K, SPREAD); ++i) {
      const int r = i * SPREAD + (SPREAD == 2 ? top & 1 : 0), h = (top + r) / SPREAD;
      const bool row_inside = r < K && top + r >= 0 && h < H;
      if (kRowsAtOnce == 1 && !row_inside) continue;
      VecN<scalar_t, VEC> window[Columns::kSize], tap[K];
#pragma unroll
      for (int c = 0; c < Columns::kSize; ++c) {
        const int w = begin + c;
        window[c] = {};
        if (row_inside && w >= 0 && w < W)
          window[c] = load_vec<VEC>(map + h * p.input_stride[2] + w * p.input_stride[3]);
      }
#pragma unroll
      for (int s = 0; s < K; ++s)
        tap[s] = *reinterpret_cast<const VecN<scalar_t, VEC>*>(own + (min_of(r, K - 1) * K + s) * pitch);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {  // outermost: one channel's floats are alive at a time
#pragma unroll
        for (int s = 0; s < K; ++s) {
#pragma unroll
          for (int j = 0; j < TW; ++j) {
            if (Columns::reads(j, s))
              sum[j][e] = fma(to_opmath(window[Columns::place(j, s)].data[e]), to_opmath(tap[s].data[e]), sum[j][e]);
          }
        }
      }
    }
    const bool at_edge =
        begin < 0 || begin + Columns::kSize > W || top < 0 || (top + K - 1) / SPREAD >= H || kRowsAtOnce > K / SPREAD;
#pragma unroll 1
    for (int j = 0; j < TW; ++j) {  // of sum[0]: the others move up
      const int ow = ow0 + j;
      if (ow >= 0 && ow < p.OW) {
        if (at_edge && !all_finite(sum[0])) {
#pragma unroll
          for (int e = 0; e < VEC; ++e) sum[0][e] = T(0);
#pragma unroll 1
          for (int i = 0; i < K * K; ++i) {
            const int y = top + i / K, x = ow * STEP - left + i % K, h = y / SPREAD, w = x / SPREAD;
            if (y < 0 || x < 0 || h >= H || w >= W || (SPREAD == 2 && ((y | x) & 1) != 0)) continue;
            const auto pixel = load_vec<VEC>(map + h * p.input_stride[2] + w * p.input_stride[3]);
#pragma unroll
            for (int e = 0; e < VEC; ++e)
              sum[0][e] = fma(to_opmath(pixel.data[e]), to_opmath(own[i * pitch + e]), sum[0][e]);
          }
        }
        after->apply(p, n, k, oh, ow, sum[0]);
        const int64_t at = n * p.output_stride[0] + oh * p.output_stride[2] + ow * p.output_stride[3] + k;
        store_rounded<scalar_t, VEC>(static_cast<scalar_t*>(p.output) + at, sum[0]);
      }
#pragma unroll
      for (int i = 0; i + 1 < TW; ++i) {
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum[i][e] = sum[i + 1][e];
      }
    }
  }
}

// Blocks of at most `threads`, with tiles as wide as `columns` at most; `bytes` of a vector.
inline ChannelsPlan plan_channels(const DepthwiseParams& p, int vec, int bytes, int64_t strips, int threads,
                                  int columns) {
  constexpr int64_t kBlocks = kMultiprocessors * 16;
  ChannelsPlan plan{};
  plan.strips = strips;
  plan.lanes = int(even_part(p.C / vec, kLineBytes / bytes));
  plan.chunks = ceil_div(p.C / vec, int64_t(plan.lanes));
  plan.columns = int(even_part(strips, columns));
  plan.rows = int(even_part(p.OH, max_of(threads / plan.lanes / plan.columns, 1)));
  plan.tiles_w = ceil_div(strips, int64_t(plan.columns));
  plan.tiles_h = ceil_div(p.OH, int64_t(plan.rows));
  plan.tiles = p.N * plan.tiles_w * plan.tiles_h;
  plan.blocks = even_part(plan.tiles, max_of(kBlocks / plan.chunks, int64_t(1)));
  plan.threads = ceil_div(plan.lanes * plan.columns * plan.rows, kWarpSize) * kWarpSize;
  return plan;
}

template <typename scalar_t, int VEC, int K, int STEP, int SPREAD, int TW>
void launch_channels(const DepthwiseParams& p, int threads, int columns, Stream stream) {
  constexpr int kBytes = VEC * int(sizeof(scalar_t));
  const int64_t strips = Window<K, STEP, SPREAD, TW>::strips(p.OW, p.padding_left);
  const ChannelsPlan plan = plan_channels(p, VEC, kBytes, strips, threads, columns);
  const size_t taps = size_t(K * K) * size_t(plan.lanes | 1) * kBytes;
  const size_t after = size_t(plan.lanes) * sizeof(Epilogue<scalar_t, VEC>);
  launch(conv2d_depthwise_channels_kernel<scalar_t, VEC, K, STEP, SPREAD, TW>,
         {dim3(unsigned(plan.blocks * plan.chunks)), dim3(unsigned(plan.threads)), taps + after, stream}, p, plan);
}

template <typename scalar_t, int VEC, int K, int STEP, int SPREAD>
void run_channels(const DepthwiseParams& p, Stream stream) {
  constexpr int kWide = 4, kNarrow = SPREAD;  // with a spread of 2 a strip begins at an even place
  constexpr int64_t kEnough = kMultiprocessors * 512;
  const int64_t strips = ceil_div(p.OW, int64_t(kWide));
  if (VEC == kPair || p.N * p.OH * strips * (p.C / VEC) >= kEnough) {
    constexpr int kThreads = channels_threads(K, STEP, kWide);
    launch_channels<scalar_t, VEC, K, STEP, SPREAD, kWide>(p, kThreads, 4, stream);
  } else if constexpr (VEC != kPair) {
    // A small map: short strips and small blocks, so that all multiprocessors get some.
    launch_channels<scalar_t, VEC, K, STEP, SPREAD, kNarrow>(p, 64, 8, stream);
  }
}

template <typename scalar_t, int VEC>
bool suits_channels(const DepthwiseParams& p) {
  return p.K == p.C && has_channel_vectors<scalar_t, VEC>(p.input, p.input_stride, p.C) &&
         has_channel_vectors<scalar_t, VEC>(p.output, p.output_stride, p.K);
}

}  // namespace
}  // namespace pvk::conv2d
