// The gradient of the bias: a block owns a tile of it, in registers, and walks along what it is broadcast over,
// computing gradients of scores again. A sum that few blocks would share is split into parts, added in their order
// afterwards.
#pragma once

#include "ops/attention/backward.cuh"

namespace pvk::attention {

constexpr int64_t kWantedBlocks = 512;  // a few for each multiprocessor

// Tiles of ROWS x COLUMNS scores: those that make the bias, and those that each of them is summed over. Beyond a size
// of 1, a dimension of the bias is the scores'.
struct BiasTiles {
  int64_t owned[4], summed[4];

  PVK_HOST_DEVICE BiasTiles(const AttentionBackwardParams& p, int rows, int columns) {
    const AttentionParams& f = p.forward;
    const int64_t tiles[4] = {f.B, f.H, ceil_div(f.L, int64_t(rows)), ceil_div(f.S, int64_t(columns))};
    for (int i = 0; i < 4; ++i) {
      owned[i] = p.bias_size[i] == 1 ? 1 : tiles[i];
      summed[i] = p.bias_size[i] == 1 ? tiles[i] : 1;
    }
  }
  PVK_HOST_DEVICE static int64_t product(const int64_t (&sizes)[4]) {
    return sizes[0] * sizes[1] * sizes[2] * sizes[3];
  }
  // Where tile `index` of the owned ones and step `n` of the summed ones are, of all tiles of scores.
  PVK_HOST_DEVICE void find(int64_t index, int64_t n, int64_t (&at)[4]) const {
    for (int i = 3; i >= 0; --i) {
      at[i] = index % owned[i] + n % summed[i];
      index /= owned[i];
      n /= summed[i];
    }
  }
};

template <typename bias_t, typename T>
PVK_DEVICE void store_bias(const BackwardCall& call, int64_t part, int64_t at, T value) {
  const int64_t (&size)[4] = call.params.bias_size;
  if (call.parts > 1) {
    static_cast<T*>(call.partials)[part * BiasTiles::product(size) + at] = value;
  } else {
    static_cast<bias_t*>(call.params.grad_bias)[at] = from_opmath<bias_t>(value);
  }
}

// Grid: parts of each owned tile.
template <typename scalar_t, int FEATURES, int EXTRAS>
__global__ void __launch_bounds__(BackwardShape<scalar_t, FEATURES, EXTRAS>::kMostWarps* kWarpSize,
                                  BackwardShape<scalar_t, FEATURES, EXTRAS>::kLeastBlocks)
    attention_backward_bias_kernel(const __grid_constant__ BackwardCall call) {
  using T = opmath_t<scalar_t>;
  using Shape = BackwardShape<scalar_t, FEATURES, EXTRAS>;
  constexpr int C = Shape::kColumns;
  const AttentionBackwardParams& p = call.params;
  const AttentionParams& f = p.forward;
  SIMT_DYN_SHARED(unsigned char, memory);
  const Shared<Shape, scalar_t> shared(memory, 2);
  const int lane = int(threadIdx.x) % kWarpSize;
  const BiasTiles tiles(p, shared.rows, C);
  const int64_t part = blockIdx.x % call.parts, index = blockIdx.x / call.parts;
  const int64_t steps = BiasTiles::product(tiles.summed);

  Scores<scalar_t, C> sums;
  sums.clear();
#pragma unroll 1
  for (int64_t n = steps * part / call.parts; n < steps * (part + 1) / call.parts; ++n) {
    int64_t at[4];
    tiles.find(index, n, at);
    const int64_t g = at[1] / (f.H / f.G), first = at[2] * shared.rows, column = at[3] * C;
    const QueryTile<C> tile(f, (at[0] * f.H + at[1]) * ceil_div(f.L, int64_t(shared.rows)) + at[2], shared.rows);
    if (at[3] < tile.first_tile || at[3] >= tile.first_tile + tile.count) continue;
    const Rows<scalar_t> query(f.query, f.query_stride, at[0], at[1], f.D), key(f.key, f.key_stride, at[0], g, f.D);
    const Rows<scalar_t> grad(p.grad_output, p.grad_output_stride, at[0], at[1], f.E);
    const Rows<scalar_t> value(f.value, f.value_stride, at[0], g, f.E);
    __syncthreads();  // until what lies there has been read
    load_rows<FEATURES>(shared.resident, query, first, shared.rows, f.L);
    load_rows<FEATURES>(shared.resident + shared.rows * Shape::kRow, grad, first, shared.rows, f.L);
    load_rows<FEATURES>(shared.stage(0, 0), key, column, C, tile.keys_end);
    load_rows<FEATURES>(shared.stage(0, 1), value, column, C, tile.keys_end);
    cp_async_wait_all();
    __syncthreads();
    const Place<scalar_t, false> place = {at[0],  at[1], first + warp_number() * kWarpRows<scalar_t>,
                                          column, f.L,   tile.keys_end};
    RowStats<scalar_t> stats;
    stats.load(call, tile.head, place.row, lane);
    Scores<scalar_t, C> scores, grads;
    multiply_rows<FEATURES>(scores, shared.mine(0), shared.stage(0, 0), lane);
    finish_scores<EXTRAS>(scores, f, place, lane);
    multiply_rows<FEATURES>(grads, shared.mine(1), shared.stage(0, 1), lane);
    finish_gradients<EXTRAS>(scores, grads, f, place, lane, stats);
    sums.for_each([&](int r, int c, T& sum) { sum += grads.at(r, c); });
  }

  int64_t at[4];
  tiles.find(index, 0, at);
  const bool one_row = p.bias_size[2] == 1, one_column = p.bias_size[3] == 1;
  if (one_column) {
#pragma unroll
    for (int r = 0; r < sums.kRows; ++r) {
#pragma unroll
      for (int c = 1; c < sums.kCount; ++c) sums.at(r, 0) += sums.at(r, c);
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) sums.at(r, 0) += shfl_xor(sums.at(r, 0), mask);
    }
  }
  const int64_t row = at[2] * shared.rows, column = at[3] * C;
  const int64_t head = (at[0] * p.bias_size[1] + at[1]) * p.bias_size[2];
  const auto store = [&](int64_t i, int64_t j, T sum) {
    if (i >= p.bias_size[2] || j >= p.bias_size[3]) return;
    const int64_t to = (head + i) * p.bias_size[3] + j;
    if (f.bias_kind == BiasKind::kAddedFloat) {
      store_bias<T>(call, part, to, sum);
    } else {
      store_bias<scalar_t>(call, part, to, sum);
    }
  };
  if (!one_row) {
    const int64_t first = row + warp_number() * kWarpRows<scalar_t>;
    sums.for_each([&](int r, int c, T sum) {
      if (one_column && (c > 0 || lane % 4 > 0)) return;
      store(first + sums.row(lane, r), one_column ? 0 : column + sums.column(lane, c), sum);
    });
    return;
  }
  // Over the rows of the warp, then over the warps.
  __syncthreads();
  T* const of_warps = reinterpret_cast<T*>(memory);
#pragma unroll
  for (int c = 0; c < sums.kCount; ++c) {
    T sum = sums.at(0, c);
    if constexpr (sums.kRows > 1) sum += sums.at(1, c);
#pragma unroll
    for (int mask = 4; mask < kWarpSize; mask *= 2) sum += shfl_xor(sum, mask);
    if (lane < 4) of_warps[warp_number() * C + sums.column(lane, c)] = sum;
  }
  __syncthreads();
  for (int c = int(threadIdx.x); c < (one_column ? 1 : C); c += int(blockDim.x)) {
    T sum = of_warps[c];
    for (int w = 1; w < int(blockDim.x) / kWarpSize; ++w) sum += of_warps[w * C + c];
    store(0, one_column ? 0 : column + c, sum);
  }
}

template <typename scalar_t, int FEATURES, int EXTRAS>
BiasTiles bias_tiles(const AttentionBackwardParams& p) {
  using Shape = BackwardShape<scalar_t, FEATURES, EXTRAS>;
  return BiasTiles(p, Shape::warps_of(p.forward.L) * kWarpRows<scalar_t>, Shape::kColumns);
}

template <typename scalar_t, int FEATURES, int EXTRAS>
int64_t parts_of_sum(const AttentionBackwardParams& p) {
  const BiasTiles tiles = bias_tiles<scalar_t, FEATURES, EXTRAS>(p);
  return min_of(ceil_div(kWantedBlocks, BiasTiles::product(tiles.owned)), BiasTiles::product(tiles.summed));
}

template <typename scalar_t, int FEATURES, int EXTRAS>
void run_backward_bias(const BackwardCall& call, Stream stream) {
  using Shape = BackwardShape<scalar_t, FEATURES, EXTRAS>;
  const int warps = Shape::warps_of(call.params.forward.L);
  const int64_t blocks = BiasTiles::product(bias_tiles<scalar_t, FEATURES, EXTRAS>(call.params).owned) * call.parts;
  launch(attention_backward_bias_kernel<scalar_t, FEATURES, EXTRAS>,
         {dim3(grid_of("attention", blocks)), dim3(unsigned(warps * kWarpSize)), Shape::shared_bytes(warps, 1), stream},
         call);
}

}  // namespace pvk::attention
