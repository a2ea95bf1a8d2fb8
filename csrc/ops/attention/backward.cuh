// The backward kernels of attention. Scores are computed again, from which and from the stored lse the weights follow:
//   d_score = weight * (kept * dot(grad_output, value) - delta),  delta = dot(grad_output, output) - grad_lse
// A block owns queries and sums grad_query over keys, or owns keys and sums grad_key and grad_value over the queries of
// the heads that share them. Every sum has one order.
#pragma once

#include "ops/attention/scores.cuh"

namespace pvk::attention {

// Two resident tiles of rows.
template <typename scalar_t, int FEATURES, int EXTRAS>
using BackwardShape = Shape<scalar_t, FEATURES, 2, EXTRAS>;

// From scores and dot(grad_output, value), in `grads`, to kept weights and gradients of scores. stats(r, c, lse, delta)
// tells of the query, with lse in the scores' units.
template <int EXTRAS, bool kByKey, typename scalar_t, int COLUMNS, int RUN, typename Stats>
PVK_DEVICE void finish_gradients(Fragment<scalar_t, COLUMNS, RUN>& scores, Fragment<scalar_t, COLUMNS, RUN>& grads,
                                 const AttentionParams& p, const Place<scalar_t, kByKey>& place, int lane,
                                 const Stats& stats) {
  using T = opmath_t<scalar_t>;
  uint32_t kept = ~0u;
  if constexpr (EXTRAS >= kDropped) kept = kept_of<Fragment<scalar_t, COLUMNS, RUN>>(p, place, lane);
  const auto is_kept = [&](int r, int c) { return (kept >> (r * scores.kCount + c) & 1) != 0; };
  if constexpr (EXTRAS >= kDropped) {
    const T factor = T(1 / (1 - p.dropout_p));
    grads.for_each([&](int r, int c, T& grad) { grad = is_kept(r, c) ? grad * factor : T(0); });
  }
  scores.for_each([&](int r, int c, T& score) {
    T lse, delta;
    stats(r, c, lse, delta);
    const bool seen = score != minus_infinity<T>();
    score = seen ? exp_of_units<scalar_t>(score - lse) : T(0);
    grads.at(r, c) = seen ? score * (grads.at(r, c) - delta) : T(0);
  });
  if constexpr (EXTRAS >= kDropped) {
    scores.for_each([&](int r, int c, T& weight) {
      if (!is_kept(r, c)) weight = T(0);
    });
  }
}

// lse and delta of a lane's rows, where rows are queries.
template <typename scalar_t>
struct RowStats {
  using T = opmath_t<scalar_t>;
  T lse[kLaneRows<scalar_t>], delta[kLaneRows<scalar_t>];

  PVK_DEVICE void load(const BackwardCall& call, int64_t head, int64_t first, int lane) {
    const AttentionParams& p = call.params.forward;
#pragma unroll
    for (int r = 0; r < kLaneRows<scalar_t>; ++r) {
      const int64_t row = first + lane / 4 + 8 * r, at = head * p.L + row;
      lse[r] = row < p.L ? __ldg(static_cast<const T*>(p.lse) + at) * T(kUnits<scalar_t>) : T(0);
      delta[r] = row < p.L ? __ldg(static_cast<const T*>(call.delta) + at) : T(0);
    }
  }
  PVK_DEVICE void operator()(int r, int, T& of_lse, T& of_delta) const {
    of_lse = lse[r];
    of_delta = delta[r];
  }
};

// Grid: tiles of queries of each (b, h).
template <typename scalar_t, int FEATURES, int EXTRAS>
__global__ void __launch_bounds__(BackwardShape<scalar_t, FEATURES, EXTRAS>::kMostWarps* kWarpSize,
                                  BackwardShape<scalar_t, FEATURES, EXTRAS>::kLeastBlocks)
    attention_backward_query_kernel(const __grid_constant__ BackwardCall call) {
  using T = opmath_t<scalar_t>;
  using Shape = BackwardShape<scalar_t, FEATURES, EXTRAS>;
  constexpr int C = Shape::kColumns;
  const AttentionBackwardParams& p = call.params;
  const AttentionParams& f = p.forward;
  SIMT_DYN_SHARED(unsigned char, memory);
  const Shared<Shape, scalar_t> shared(memory, 2);
  const int lane = int(threadIdx.x) % kWarpSize;
  const QueryTile<C> tile(f, blockIdx.x, shared.rows);
  const Rows<scalar_t> key(f.key, f.key_stride, tile.b, tile.g, f.D);
  const Rows<scalar_t> value(f.value, f.value_stride, tile.b, tile.g, f.E);
  const uint8_t* const absent = absent_of(f, call.absent, tile.b, tile.h);
  Place<scalar_t, false> place = {tile.b, tile.h, tile.first + warp_number() * kWarpRows<scalar_t>,
                                  0,      f.L,    tile.keys_end};

  Sums<scalar_t, FEATURES> sums;
  sums.clear();
  RowStats<scalar_t> stats;
  stats.load(call, tile.head, place.row, lane);
  if (tile.count > 0) {
    const Rows<scalar_t> query(f.query, f.query_stride, tile.b, tile.h, f.D);
    const Rows<scalar_t> grad(p.grad_output, p.grad_output_stride, tile.b, tile.h, f.E);
    load_rows<FEATURES>(shared.resident, query, tile.first, shared.rows, f.L);
    load_rows<FEATURES>(shared.resident + shared.rows * Shape::kRow, grad, tile.first, shared.rows, f.L);
  }
  const auto load = [&](int64_t n) {
    load_rows<FEATURES>(shared.stage(n, 0), key, (tile.first_tile + n) * C, C, tile.keys_end, absent);
    load_rows<FEATURES>(shared.stage(n, 1), value, (tile.first_tile + n) * C, C, tile.keys_end, absent);
  };
  walk<Shape::kStages>(tile.count, load, [&](int64_t n) {
    place.column = (tile.first_tile + n) * C;
    Scores<scalar_t, C> scores, grads;
    multiply_rows<FEATURES>(scores, shared.mine(0), shared.stage(n, 0), lane);
    finish_scores<EXTRAS>(scores, f, place, lane);
    multiply_rows<FEATURES>(grads, shared.mine(1), shared.stage(n, 1), lane);
    finish_gradients<EXTRAS>(scores, grads, f, place, lane, stats);
    add_weighted<FEATURES>(sums, grads, shared.stage(n, 0), shared.my_weights(), lane);
  });
  const Rows<scalar_t> grad_query(p.grad_query, p.grad_query_stride, tile.b, tile.h, f.D);
  store_rows<FEATURES>(grad_query, place.row, f.L, sums, shared.mine(0), lane,
                       [&](int, T value) { return value * T(f.scale); });
}

// A block's tile of keys of a head, and the tiles of COLUMNS queries, of each head that shares it, that look at any.
template <int COLUMNS>
struct KeyTile {
  int64_t b, g, first, keys_end, first_tile, count;  // count of a head

  PVK_DEVICE KeyTile(const AttentionParams& p, int64_t index, int rows) {
    const int64_t tiles = ceil_div(p.S, int64_t(rows)), head = index / tiles;
    b = head / p.G;
    g = head % p.G;
    first = index % tiles * rows;
    keys_end = keys_end_of(p, b);
    first_tile = max_of(first - p.right, int64_t(0)) / COLUMNS;
    const int64_t last = min_of(first + rows, keys_end);
    const int64_t end = last > first ? min_of(p.L, last + p.left) : 0;
    count = max_of(ceil_div(end, int64_t(COLUMNS)) - first_tile, int64_t(0));
  }
};

// lse and delta of COLUMNS queries go into the padding of the rows of query and grad_output.
template <typename scalar_t, int FEATURES>
PVK_DEVICE opmath_t<scalar_t>* padding_of(scalar_t* tile, int row) {
  return reinterpret_cast<opmath_t<scalar_t>*>(tile + row * kPitch<scalar_t, FEATURES> + FEATURES);
}

template <typename scalar_t, int FEATURES>
PVK_DEVICE void load_column_stats(scalar_t* tile, const void* stats, int64_t first, int count, int64_t end) {
  using T = opmath_t<scalar_t>;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const bool is_there = first + i < end;
    cp_async<int(sizeof(T))>(padding_of<scalar_t, FEATURES>(tile, i),
                             static_cast<const T*>(stats) + (is_there ? first + i : 0), is_there ? sizeof(T) : 0);
  }
}

// Grid: tiles of keys of each (b, g).
template <typename scalar_t, int FEATURES, int EXTRAS, bool kOfKey, bool kOfValue>
__global__ void __launch_bounds__(BackwardShape<scalar_t, FEATURES, EXTRAS>::kMostWarps* kWarpSize,
                                  BackwardShape<scalar_t, FEATURES, EXTRAS>::kLeastBlocks)
    attention_backward_key_kernel(const __grid_constant__ BackwardCall call) {
  using T = opmath_t<scalar_t>;
  using Shape = BackwardShape<scalar_t, FEATURES, EXTRAS>;
  constexpr int C = Shape::kColumns;
  const AttentionBackwardParams& p = call.params;
  const AttentionParams& f = p.forward;
  SIMT_DYN_SHARED(unsigned char, memory);
  const Shared<Shape, scalar_t> shared(memory, 2);
  const int lane = int(threadIdx.x) % kWarpSize;
  const KeyTile<C> tile(f, blockIdx.x, shared.rows);
  const int64_t group = f.H / f.G;
  Place<scalar_t, true> place = {tile.b, 0, tile.first + warp_number() * kWarpRows<scalar_t>, 0, tile.keys_end, f.L};

  Sums<scalar_t, FEATURES> key_sums, value_sums;
  if (kOfKey) key_sums.clear();
  if (kOfValue) value_sums.clear();
  if (tile.count > 0) {
    const Rows<scalar_t> key(f.key, f.key_stride, tile.b, tile.g, f.D);
    const Rows<scalar_t> value(f.value, f.value_stride, tile.b, tile.g, f.E);
    load_rows<FEATURES>(shared.resident, key, tile.first, shared.rows, tile.keys_end);
    if (kOfKey)
      load_rows<FEATURES>(shared.resident + shared.rows * Shape::kRow, value, tile.first, shared.rows, tile.keys_end);
  }
  const auto load = [&](int64_t n) {
    const int64_t h = tile.g * group + n / tile.count, column = (tile.first_tile + n % tile.count) * C;
    const int64_t stats = (tile.b * f.H + h) * f.L;
    const Rows<scalar_t> query(f.query, f.query_stride, tile.b, h, f.D);
    const Rows<scalar_t> grad(p.grad_output, p.grad_output_stride, tile.b, h, f.E);
    load_rows<FEATURES>(shared.stage(n, 0), query, column, C, f.L);
    load_rows<FEATURES>(shared.stage(n, 1), grad, column, C, f.L);
    load_column_stats<scalar_t, FEATURES>(shared.stage(n, 0), static_cast<const T*>(f.lse) + stats, column, C, f.L);
    load_column_stats<scalar_t, FEATURES>(shared.stage(n, 1), static_cast<const T*>(call.delta) + stats, column, C,
                                          f.L);
  };
  walk<Shape::kStages>(tile.count * group, load, [&](int64_t n) {
    place.h = tile.g * group + n / tile.count;
    place.column = (tile.first_tile + n % tile.count) * C;
    scalar_t *const query = shared.stage(n, 0), *const grad = shared.stage(n, 1);
    Scores<scalar_t, C> scores, grads;
    multiply_rows<FEATURES>(scores, shared.mine(0), query, lane);
    finish_scores<EXTRAS>(scores, f, place, lane);
    if (kOfKey) {
      multiply_rows<FEATURES>(grads, shared.mine(1), grad, lane);
    } else {
      grads.clear();
    }
    finish_gradients<EXTRAS>(scores, grads, f, place, lane, [&](int, int c, T& lse, T& delta) {
      lse = *padding_of<scalar_t, FEATURES>(query, scores.column(lane, c)) * T(kUnits<scalar_t>);
      delta = kOfKey ? *padding_of<scalar_t, FEATURES>(grad, scores.column(lane, c)) : T(0);
    });
    if (kOfValue) add_weighted<FEATURES>(value_sums, scores, grad, shared.my_weights(), lane);
    if (kOfKey) add_weighted<FEATURES>(key_sums, grads, query, shared.my_weights(), lane);
  });

  bool is_absent[kLaneRows<scalar_t>];
#pragma unroll
  for (int r = 0; r < kLaneRows<scalar_t>; ++r) {
    const int64_t j = place.row + lane / 4 + 8 * r;
    is_absent[r] = j >= tile.keys_end;
    if (is_absent[r] || f.bias == nullptr) continue;
    is_absent[r] = true;
    for (int64_t h = tile.g * group; h < (tile.g + 1) * group; ++h)
      is_absent[r] = is_absent[r] && absent_of(f, call.absent, tile.b, h)[j] != 0;
  }
  if (kOfKey) {
    const Rows<scalar_t> rows(p.grad_key, p.grad_key_stride, tile.b, tile.g, f.D);
    store_rows<FEATURES>(rows, place.row, f.S, key_sums, shared.mine(0), lane,
                         [&](int r, T value) { return is_absent[r] ? T(0) : value * T(f.scale); });
  }
  if (kOfValue) {
    const Rows<scalar_t> rows(p.grad_value, p.grad_value_stride, tile.b, tile.g, f.E);
    store_rows<FEATURES>(rows, place.row, f.S, value_sums, shared.mine(0), lane,
                         [&](int r, T value) { return is_absent[r] ? T(0) : value * T(1 / (1 - f.dropout_p)); });
  }
}

// Rows by which a kernel's blocks are counted, and most steps of one.
template <typename scalar_t, int FEATURES, int EXTRAS, typename Kernel>
void run_backward_rows(Kernel kernel, const BackwardCall& call, int64_t heads, int64_t rows, int64_t steps,
                       Stream stream) {
  using Shape = BackwardShape<scalar_t, FEATURES, EXTRAS>;
  const int warps = Shape::warps_of(rows);
  const int64_t blocks = heads * ceil_div(rows, int64_t(warps * kWarpRows<scalar_t>));
  launch(kernel,
         {dim3(grid_of("attention", blocks)), dim3(unsigned(warps * kWarpSize)), Shape::shared_bytes(warps, steps),
          stream},
         call);
}

template <typename scalar_t, int FEATURES, int EXTRAS>
void run_backward_query(const BackwardCall& call, Stream stream) {
  const AttentionParams& p = call.params.forward;
  const int64_t steps = ceil_div(p.S, int64_t(BackwardShape<scalar_t, FEATURES, EXTRAS>::kColumns));
  run_backward_rows<scalar_t, FEATURES, EXTRAS>(attention_backward_query_kernel<scalar_t, FEATURES, EXTRAS>, call,
                                                p.B * p.H, p.L, steps, stream);
}

template <typename scalar_t, int FEATURES, int EXTRAS>
void run_backward_key(const BackwardCall& call, Stream stream) {
  const AttentionParams& p = call.params.forward;
  const int64_t steps = ceil_div(p.L, int64_t(BackwardShape<scalar_t, FEATURES, EXTRAS>::kColumns)) * (p.H / p.G);
  const auto run = [&]<bool kOfKey, bool kOfValue>() {
    run_backward_rows<scalar_t, FEATURES, EXTRAS>(
        attention_backward_key_kernel<scalar_t, FEATURES, EXTRAS, kOfKey, kOfValue>, call, p.B * p.G, p.S, steps,
        stream);
  };
  if constexpr (kBothFit<FEATURES>) {
    run.template operator()<true, true>();
  } else {
    run.template operator()<true, false>();
    run.template operator()<false, true>();
  }
}

}  // namespace pvk::attention
