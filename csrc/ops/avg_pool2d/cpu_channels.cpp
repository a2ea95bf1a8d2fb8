// Average pooling of channels_last maps on the CPU, forward and backward: registers along channels.
//
// A task is a row of the output, or of the gradient, or some of its channels. Windows of three pixels that share some
// keep the sums of columns from one output to the next. Backward, a pixel of the map adds, in their order, the
// gradients of the windows that it is in, each divided as its window was.
#include "core/dispatch.h"
#include "core/pool_channels.h"
#include "ops/avg_pool2d/cpu_kernels.h"

namespace pvk::avg_pool2d::PVK_ISA {
namespace {

// a / b, of which the reciprocal is known: what it misses is added, so that the result is the division's.
template <typename T>
PVK_INLINE Vec<T> divide(Vec<T> a, T b, [[maybe_unused]] T reciprocal) {
#if defined(__FMA__)
  const Vec<T> quotient = a * reciprocal;
  const Vec<T> missed = fma(-quotient, splat(b), a);
  const Mask<T> finite = missed == missed;  // not where the quotient is infinite
  return fma((Vec<T>)((Mask<T>)missed & finite), splat(reciprocal), quotient);
#else
  return a / b;
#endif
}

template <typename scalar_t, typename T>
PVK_INLINE void write(scalar_t* output, const Pair<T>& total, T divisor, T reciprocal, int64_t count, bool past) {
  const Pair<T> mean{divide<T>(total.first, divisor, reciprocal), divide<T>(total.second, divisor, reciprocal)};
  if (past) {
    stream_elements(output, mean);
  } else {
    store_elements(output, mean, count);
  }
}

// Pixels of a window, or of some of its rows; steps count elements.
struct Taps {
  int64_t rows, columns, row_step, column_step;
};

// kPairs of channels of one output pixel, the last with `count`: sums of rows, then of these, so that the error grows
// with the root of a side. K is the side of the window, or 0; `sums` is what is known of a window of more rows.
template <int kPairs, bool kWhole, int K, typename scalar_t, typename T>
PVK_INLINE void average_pixel(const Taps& taps, const scalar_t* from, T* sums, bool first, bool last, T divisor,
                              T reciprocal, scalar_t* output, int64_t count, bool past, Ahead& ahead) {
  constexpr int64_t kStep = kPair<scalar_t>, kLane = kLanes<T>;
  const int64_t row_count = K > 0 ? K : taps.rows, column_count = K > 0 ? K : taps.columns;
  Pair<T> total[kPairs];
  if (K == 0 && !first) {
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) total[v] = {load(sums + v * kStep), load(sums + v * kStep + kLane)};
  }
#pragma GCC unroll 3
  for (int64_t y = 0; y < row_count; ++y) {
    const scalar_t* at = from + y * taps.row_step;
    Pair<T> row[kPairs];
#pragma GCC unroll 3
    for (int64_t x = 0; x < column_count; ++x, at += taps.column_step) {
#pragma GCC unroll 4
      for (int v = 0; v < kPairs; ++v)
        row[v] = row[v] + load_elements(at + v * kStep, kWhole || v + 1 < kPairs ? kStep : count);
      ahead.ask(kLinesOf<scalar_t, kPairs>);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) total[v] = total[v] + row[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < kPairs; ++v) {
    if (K == 0 && !last) {
      store(sums + v * kStep, total[v].first);
      store(sums + v * kStep + kLane, total[v].second);
      continue;
    }
    const int64_t elements = kWhole || v + 1 < kPairs ? kStep : count;
    write<scalar_t, T>(output + v * kStep, total[v], divisor, reciprocal, elements, kWhole && past);
  }
}

// A row of outputs whose windows are 3 columns, S apart: sums of columns, then of three of these.
template <int kPairs, bool kWhole, int S, typename scalar_t, typename T>
PVK_INLINE void average_row(const AvgPool2dParams& p, const Taps& taps, const scalar_t* from, const T* divisors,
                            const T* reciprocals, scalar_t* output, int64_t count, bool past, Ahead& ahead) {
  constexpr int64_t kStep = kPair<scalar_t>;
  const auto column = [&](int64_t x, Pair<T>* sum) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) sum[v] = Pair<T>();
    if (x < 0 || x >= p.columns.size) return;
    const scalar_t* at = from + x * taps.column_step;
    for (int64_t y = 0; y < taps.rows; ++y, at += taps.row_step)
#pragma GCC unroll 4
      for (int v = 0; v < kPairs; ++v)
        sum[v] = sum[v] + load_elements(at + v * kStep, kWhole || v + 1 < kPairs ? kStep : count);
    ahead.ask(kLinesOf<scalar_t, kPairs>);
  };
  Pair<T> left[kPairs], middle[kPairs], right[kPairs];
  int64_t x = -p.columns.padding;
  column(x, left);
  if (S == 1) column(x + 1, middle);
  for (int64_t ow = 0; ow < p.columns.outputs; ++ow, x += S) {
    if (S == 2) column(x + 1, middle);
    column(x + 2, right);
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      const int64_t elements = kWhole || v + 1 < kPairs ? kStep : count;
      write<scalar_t, T>(output + ow * p.C + v * kStep, left[v] + middle[v] + right[v], divisors[ow], reciprocals[ow],
                         elements, kWhole && past);
      left[v] = S == 1 ? middle[v] : right[v];
      middle[v] = right[v];
    }
  }
}

template <typename scalar_t>
void pool(const AvgPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kStep = kPair<scalar_t>;
  const int64_t OH = p.rows.outputs, OW = p.columns.outputs;
  ChannelsMap<scalar_t> map(p.map, p.N, p.C, p.map_stride, p.rows, p.columns);
  const int64_t part = channels_of_part<scalar_t>(p.C, p.N * OH), parts = ceil_div(p.C, part);
  map.asks = map.asks && parts == 1;
  Buffer<PoolRange> windows(OW);
  Buffer<T> column_factors(OW);
  for (int64_t o = 0; o < OW; ++o) windows[o] = p.columns.window(o);
  column_divisors(p, 1, OW, column_factors.data());
  const int64_t bytes = p.N * p.C * OH * OW * int64_t(sizeof(scalar_t));
  const bool past = p.C % kStep == 0 && streams(static_cast<scalar_t*>(p.pooled), p.C, bytes);
  const bool rolls =
      p.columns.kernel == 3 && p.columns.stride <= 2 && p.rows.kernel > 0 && map.at_once >= p.rows.kernel;
  const int64_t pitch = ceil_div(part, kStep) * kStep;
  const int64_t reads = part * max_of(p.rows.size / OH, int64_t(1)) * p.columns.size;
  const int64_t chunk = max_of<int64_t>(1, kPiece / max_of<int64_t>(1, reads));
  parallel_for(p.N * OH * parts, chunk, [&](int64_t begin, int64_t end) {
    Buffer<T> sums, divisors(OW), reciprocals(OW);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / parts / OH, oh = i / parts % OH, c0 = i % parts * part, c1 = min_of(c0 + part, p.C);
      const T row_factor = T(p.divisor_of(p.rows, true, oh));
      for (int64_t ow = 0; ow < OW; ++ow) {
        divisors[ow] = row_factor * column_factors[ow];
        reciprocals[ow] = T(1) / divisors[ow];
      }
      scalar_t* const output = static_cast<scalar_t*>(p.pooled) + n * p.pooled_stride[0] + oh * p.pooled_stride[2];
      const auto group = [&](const PoolRange& rows, bool first, bool last, Ahead ahead) {
        Taps taps{max_of<int64_t>(0, rows.end - rows.begin), 0, p.map_stride[2], p.C};
        const scalar_t* const line =
            taps.rows == 0 ? map.data : map.data + n * p.map_stride[0] + rows.begin * p.map_stride[2];
        if (rolls) {
          for_channels<scalar_t>(
              c0, c1, [&]<int kPairs, bool kWhole>(int64_t c, int64_t count) __attribute__((always_inline)) {
                const auto row = [&]<int S>() __attribute__((always_inline)) {
                  average_row<kPairs, kWhole, S, scalar_t, T>(p, taps, line + c, divisors.data(), reciprocals.data(),
                                                              output + c, count, past, ahead);
                };
                p.columns.stride == 1 ? row.template operator()<1>() : row.template operator()<2>();
              });
          return;
        }
        const bool whole = first && last;
        if (!whole) sums.reserve(OW * pitch);
        for (int64_t ow = 0; ow < OW; ++ow) {
          taps.columns = max_of<int64_t>(0, windows[ow].end - windows[ow].begin);
          const scalar_t* const from = taps.columns == 0 ? line : line + windows[ow].begin * p.C;
          for_channels<scalar_t>(
              c0, c1, [&]<int kPairs, bool kWhole>(int64_t c, int64_t count) __attribute__((always_inline)) {
                const auto pixel = [&]<int K>() __attribute__((always_inline)) {
                  average_pixel<kPairs, kWhole, K, scalar_t, T>(
                      taps, from + c, whole ? nullptr : sums.data() + ow * pitch + c - c0, first, last, divisors[ow],
                      reciprocals[ow], output + ow * p.C + c, count, past, ahead);
                };
                whole&& taps.rows == 2 && taps.columns == 2 ? pixel.template operator()<2>()
                                                            : pixel.template operator()<0>();
              });
        }
      };
      map.for_groups(n, oh, group);
    }
    if (past) end_of_streams();
  });
}

template <bool kPast, typename scalar_t, typename T>
PVK_INLINE void write_gradient(scalar_t* target, const Pair<T>& sum, int64_t count) {
  if constexpr (kPast) {
    stream_elements(target, sum);
  } else {
    store_elements(target, sum, count);
  }
}

// The windows that a row of the map is in, of all its columns.
template <typename scalar_t, typename T>
struct Givers {
  const scalar_t* grad;
  PoolRange rows;
  const PoolRange* columns;
  const T* row_factors;
  const T* column_factors;
};

// kPairs of channels of one pixel of the map, the last with `count`. Past the caches where the gradient is larger than
// they are.
template <int kPairs, bool kWhole, bool kPast, typename scalar_t, typename T>
PVK_INLINE void gather_pixel(const AvgPool2dParams& p, const Givers<scalar_t, T>& from, const PoolRange& columns,
                             int64_t c, scalar_t* target, int64_t count) {
  constexpr int64_t kStep = kPair<scalar_t>;
  Pair<T> sum[kPairs];
  for (int64_t oh = from.rows.begin; oh < from.rows.end; ++oh)
    for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
      const scalar_t* const grad = from.grad + oh * p.pooled_stride[2] + ow * p.C + c;
      const Pair<T> factor(from.row_factors[oh] * from.column_factors[ow]);
#pragma GCC unroll 4
      for (int v = 0; v < kPairs; ++v)
        sum[v] = fma(load_elements(grad + v * kStep, kWhole || v + 1 < kPairs ? kStep : count), factor, sum[v]);
    }
#pragma GCC unroll 4
  for (int v = 0; v < kPairs; ++v)
    write_gradient<kPast && kWhole>(target + v * kStep, sum[v], kWhole || v + 1 < kPairs ? kStep : count);
}

// A row of the map of which pixels share windows: sums of the windows above each other, then of those beside each
// other.
template <int kPairs, bool kWhole, bool kPast, typename scalar_t, typename T>
PVK_INLINE void gather_row(const AvgPool2dParams& p, const Givers<scalar_t, T>& from, int64_t c, T* sums,
                           scalar_t* target, int64_t count, Ahead& ahead) {
  constexpr int64_t kStep = kPair<scalar_t>, kLane = kLanes<T>;
  for (int64_t ow = 0; ow < p.columns.outputs; ++ow) {
    Pair<T> sum[kPairs];
    const scalar_t* at = from.grad + from.rows.begin * p.pooled_stride[2] + ow * p.C + c;
    for (int64_t oh = from.rows.begin; oh < from.rows.end; ++oh, at += p.pooled_stride[2]) {
      const Pair<T> factor(from.row_factors[oh] * from.column_factors[ow]);
#pragma GCC unroll 4
      for (int v = 0; v < kPairs; ++v)
        sum[v] = fma(load_elements(at + v * kStep, kWhole || v + 1 < kPairs ? kStep : count), factor, sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      store(sums + (ow * kPairs + v) * kStep, sum[v].first);
      store(sums + (ow * kPairs + v) * kStep + kLane, sum[v].second);
    }
    ahead.ask(kLinesOf<scalar_t, kPairs>);
  }
  for (int64_t x = 0; x < p.columns.size; ++x, target += p.C) {
    Pair<T> sum[kPairs];
    for (int64_t ow = from.columns[x].begin; ow < from.columns[x].end; ++ow)
#pragma GCC unroll 4
      for (int v = 0; v < kPairs; ++v) {
        const T* const given = sums + (ow * kPairs + v) * kStep;
        sum[v] = sum[v] + Pair<T>(load(given), load(given + kLane));
      }
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v)
      write_gradient<kPast && kWhole>(target + v * kStep, sum[v], kWhole || v + 1 < kPairs ? kStep : count);
  }
}

template <bool kPast, typename scalar_t>
void gather(const AvgPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  const int64_t H = p.rows.size, W = p.columns.size, OH = p.rows.outputs, OW = p.columns.outputs;
  Buffer<PoolRange> columns(W);
  for (int64_t x = 0; x < W; ++x) columns[x] = p.columns.outputs_of(x);
  Buffer<T> row_factors(OH), column_factors(OW);
  for (int64_t o = 0; o < OH; ++o) row_factors[o] = T(1) / T(p.divisor_of(p.rows, true, o));
  for (int64_t o = 0; o < OW; ++o) column_factors[o] = T(1) / T(p.divisor_of(p.columns, false, o));
  const bool shares = p.columns.stride < p.columns.kernel;
  const bool asks = p.N * H * p.C * W * int64_t(sizeof(scalar_t)) >= kLeastAhead;
  parallel_for(p.N * H, max_of<int64_t>(1, kPiece / (p.C * W)), [&](int64_t begin, int64_t end) {
    Buffer<T> sums;
    if (shares) sums.reserve(OW * 2 * kPair<scalar_t>);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / H, y = i % H;
      const scalar_t* const grad = static_cast<const scalar_t*>(p.pooled) + n * p.pooled_stride[0];
      const Givers<scalar_t, T> from{grad, p.rows.outputs_of(y), columns.data(), row_factors.data(),
                                     column_factors.data()};
      Ahead ahead;
      if (asks) ahead = ahead_of_outputs(p.rows, grad, p.pooled_stride, y, n + 1 == p.N);
      scalar_t* const row = static_cast<scalar_t*>(p.map) + n * p.map_stride[0] + y * p.map_stride[2];
      if (shares) {
        for_channels<scalar_t>(
            0, p.C, [&]<int kPairs, bool kWhole>(int64_t c, int64_t count) __attribute__((always_inline)) {
              gather_row<kPairs, kWhole, kPast, scalar_t, T>(p, from, c, sums.data(), row + c, count, ahead);
            });
        continue;
      }
      for (int64_t x = 0; x < W; ++x)
        for_channels<scalar_t>(
            0, p.C, [&]<int kPairs, bool kWhole>(int64_t c, int64_t count) __attribute__((always_inline)) {
              gather_pixel<kPairs, kWhole, kPast, scalar_t, T>(p, from, columns[x], c, row + x * p.C + c, count);
              ahead.ask(kLinesOf<scalar_t, kPairs>);
            });
    }
    if constexpr (kPast) end_of_streams();
  });
}

}  // namespace

void forward_channels(const AvgPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { pool<decltype(scalar)>(p); });
}

void backward_channels(const AvgPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const int64_t bytes = p.N * p.C * p.rows.size * p.columns.size * int64_t(sizeof(scalar_t));
    if (p.C % kPair<scalar_t> == 0 && streams(static_cast<scalar_t*>(p.map), p.C, bytes))
      return gather<true, scalar_t>(p);
    gather<false, scalar_t>(p);
  });
}

}  // namespace pvk::avg_pool2d::PVK_ISA
