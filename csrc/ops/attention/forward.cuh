// The forward kernel of attention, as FlashAttention-2 (Dao, 2023): a block owns queries of a head.
#pragma once

#include "ops/attention/scores.cuh"

namespace pvk::attention {

// The softmax of a warp's rows as far as it has come: a lane's sums are of its own columns.
template <typename scalar_t, int FEATURES>
struct Softmax {
  using T = opmath_t<scalar_t>;
  static constexpr int kRows = kLaneRows<scalar_t>;
  T max[kRows], sum[kRows];
  Sums<scalar_t, FEATURES> output;

  PVK_DEVICE void begin() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) max[r] = minus_infinity<T>(), sum[r] = T(0);
    output.clear();
  }

  // From scores to weights relative to the new maximum, to which all before is brought.
  template <typename Scores>
  PVK_DEVICE void add(Scores& scores, bool is_first) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      T larger = max[r];
#pragma unroll
      for (int c = 0; c < Scores::kCount; ++c) larger = scores.at(r, c) > larger ? scores.at(r, c) : larger;
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        const T other = shfl_xor(larger, mask);
        larger = other > larger ? other : larger;
      }
      const T base = larger == minus_infinity<T>() ? T(0) : larger;
      T total = T(0);
#pragma unroll
      for (int c = 0; c < Scores::kCount; ++c) {
        scores.at(r, c) = exp_of_units<scalar_t>(scores.at(r, c) - base);
        total += scores.at(r, c);
      }
      if (!is_first) {
        const T factor = exp_of_units<scalar_t>(max[r] - base);
        total += sum[r] * factor;
#pragma unroll
        for (int c = 0; c < output.kCount; ++c) output.at(r, c) *= factor;
      }
      sum[r] = total;
      max[r] = larger;
    }
  }

  PVK_DEVICE void end() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) sum[r] += shfl_xor(sum[r], mask);
    }
  }
};

template <typename scalar_t, int FEATURES, int EXTRAS>
using ForwardShape = Shape<scalar_t, FEATURES, 1, EXTRAS>;

// Grid: tiles of queries of each (b, h).
template <typename scalar_t, int FEATURES, int EXTRAS>
__global__ void __launch_bounds__(ForwardShape<scalar_t, FEATURES, EXTRAS>::kMostWarps* kWarpSize,
                                  ForwardShape<scalar_t, FEATURES, EXTRAS>::kLeastBlocks)
    attention_forward_kernel(const __grid_constant__ AttentionParams p) {
  using T = opmath_t<scalar_t>;
  using Shape = ForwardShape<scalar_t, FEATURES, EXTRAS>;
  constexpr int C = Shape::kColumns;
  SIMT_DYN_SHARED(unsigned char, memory);
  const Shared<Shape, scalar_t> shared(memory, 1);
  const int lane = int(threadIdx.x) % kWarpSize;
  const QueryTile<C> tile(p, blockIdx.x, shared.rows);
  const Rows<scalar_t> query(p.query, p.query_stride, tile.b, tile.h, p.D);
  const Rows<scalar_t> key(p.key, p.key_stride, tile.b, tile.g, p.D);
  const Rows<scalar_t> value(p.value, p.value_stride, tile.b, tile.g, p.E);
  const uint8_t* const absent = absent_of(p, static_cast<const uint8_t*>(p.scratch), tile.b, tile.h);
  Place<scalar_t, false> place = {tile.b, tile.h, tile.first + warp_number() * kWarpRows<scalar_t>,
                                  0,      p.L,    tile.keys_end};

  Softmax<scalar_t, FEATURES> softmax;
  softmax.begin();
  if (tile.count > 0) load_rows<FEATURES>(shared.resident, query, tile.first, shared.rows, p.L);
  const auto load = [&](int64_t n) {
    load_rows<FEATURES>(shared.stage(n, 0), key, (tile.first_tile + n) * C, C, tile.keys_end, absent);
    load_rows<FEATURES>(shared.stage(n, 1), value, (tile.first_tile + n) * C, C, tile.keys_end, absent);
  };
  walk<Shape::kStages>(tile.count, load, [&](int64_t n) {
    place.column = (tile.first_tile + n) * C;
    Scores<scalar_t, C> scores;
    multiply_rows<FEATURES>(scores, shared.mine(0), shared.stage(n, 0), lane);
    finish_scores<EXTRAS>(scores, p, place, lane);
    softmax.add(scores, n == 0);
    if constexpr (EXTRAS >= kDropped) {
      const uint32_t kept = kept_of<Scores<scalar_t, C>>(p, place, lane);
      scores.for_each([&](int r, int c, T& weight) {
        if ((kept >> (r * scores.kCount + c) & 1) == 0) weight = T(0);
      });
    }
    add_weighted<FEATURES>(softmax.output, scores, shared.stage(n, 1), shared.my_weights(), lane);
  });
  softmax.end();

  T* const lse = static_cast<T*>(p.lse) + tile.head * p.L;
  T factors[kLaneRows<scalar_t>];
#pragma unroll
  for (int r = 0; r < kLaneRows<scalar_t>; ++r) {
    const int64_t row = place.row + softmax.output.row(lane, r);
    const T sum = softmax.sum[r];
    factors[r] = T(1) / (sum * T(1 - p.dropout_p));
    if (lane % 4 == 0 && row < p.L) {
      lse[row] = sum == T(0) ? minus_infinity<T>() : softmax.max[r] / T(kUnits<scalar_t>) + log_of(sum);
    }
  }
  const Rows<scalar_t> output(p.output, p.output_stride, tile.b, tile.h, p.E);
  store_rows<FEATURES>(output, place.row, p.L, softmax.output, shared.mine(0), lane,
                       [&](int r, T value) { return softmax.sum[r] == T(0) ? T(0) : value * factors[r]; });
}

template <typename scalar_t, int FEATURES, int EXTRAS>
void run_forward(const AttentionParams& p, Stream stream) {
  using Shape = ForwardShape<scalar_t, FEATURES, EXTRAS>;
  const int warps = Shape::warps_of(p.L);
  const int64_t blocks = p.B * p.H * ceil_div(p.L, int64_t(warps * kWarpRows<scalar_t>));
  const size_t bytes = Shape::shared_bytes(warps, ceil_div(p.S, int64_t(Shape::kColumns)));
  launch(attention_forward_kernel<scalar_t, FEATURES, EXTRAS>,
         {dim3(grid_of("attention", blocks)), dim3(unsigned(warps * kWarpSize)), bytes, stream}, p);
}

}  // namespace pvk::attention
