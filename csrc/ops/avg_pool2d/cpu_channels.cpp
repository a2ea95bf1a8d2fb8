// Average pooling of channels_last maps on the CPU, forward and backward: registers along channels.
//
// A task is rows of the output, or of the gradient. Backward, a pixel of the map adds, in their order, the gradients of
// the windows that it is in, each divided as its window was.
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/stream.h"
#include "ops/avg_pool2d/cpu_kernels.h"

namespace pvk::avg_pool2d::PVK_ISA {
namespace {

// kVectors registers of channels of one output pixel, the last with `in_last`: sums of rows, then of these, so that the
// error grows with the root of a side.
template <int kVectors, typename scalar_t, typename T>
PVK_INLINE void average_pixel(const AvgPool2dParams& p, const scalar_t* map, const PoolRange& rows,
                              const PoolRange& columns, T divisor, scalar_t* output, int64_t in_last) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t ahead = 2 * p.columns.stride * p.map_stride[3];  // what the window after the next reads
  Vec<T> total[kVectors] = {};
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const scalar_t* from = map + y * p.map_stride[2] + columns.begin * p.map_stride[3];
    Vec<T> row[kVectors] = {};
    for (int64_t x = columns.begin; x < columns.end; ++x, from += p.map_stride[3]) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(from + v * kLane + ahead);
        row[v] += v + 1 == kVectors ? load_some(from + v * kLane, in_last) : load(from + v * kLane);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[v] += row[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v)
    store_some(output + v * kLane, total[v] / divisor, v + 1 == kVectors ? in_last : kLane);
}

template <typename scalar_t>
void pool(const AvgPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t OH = p.rows.outputs, OW = p.columns.outputs;
  Buffer<PoolRange> windows(OW);
  Buffer<T> divisors(OW);
  for (int64_t o = 0; o < OW; ++o) windows[o] = p.columns.window(o);
  column_divisors(p, 1, OW, divisors.data());
  const int64_t blocks = ceil_div(p.C, 4 * kLane);
  // One output row an image: channels are shared out too.
  const int64_t parts = OH < 4 ? blocks : 1;
  const int64_t reads = max_of<int64_t>(1, p.C * max_of(p.rows.size / OH, int64_t(1)) * p.columns.size / parts);
  parallel_for(
      p.N * OH * parts, max_of<int64_t>(1, kPiece / max_of<int64_t>(1, reads)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / parts / OH, oh = i / parts % OH;
          const int64_t first = parts == 1 ? 0 : i % parts * 4 * kLane;
          const int64_t last = parts == 1 ? p.C : min_of(first + 4 * kLane, p.C);
          const scalar_t* const map = static_cast<const scalar_t*>(p.map) + n * p.map_stride[0];
          const PoolRange rows = p.rows.window(oh);
          const T row_divisor = T(p.divisor_of(p.rows, true, oh));
          for (int64_t ow = 0; ow < OW; ++ow) {
            scalar_t* const output = static_cast<scalar_t*>(p.pooled) + n * p.pooled_stride[0] +
                                     oh * p.pooled_stride[2] + ow * p.pooled_stride[3];
            const T divisor = row_divisor * divisors[ow];
            int64_t c = first;
            for (; last - c > 3 * kLane; c += 4 * kLane)
              average_pixel<4, scalar_t, T>(p, map + c, rows, windows[ow], divisor, output + c, last - c - 3 * kLane);
            for (; c < last; c += kLane)
              average_pixel<1, scalar_t, T>(p, map + c, rows, windows[ow], divisor, output + c, last - c);
          }
        }
      });
}

// kVectors registers of channels of one pixel of the map, the last with `in_last`. Past the caches where the gradient
// is larger than they are.
template <int kVectors, bool kPast, typename scalar_t, typename T>
PVK_INLINE void gather_pixel(const AvgPool2dParams& p, const scalar_t* grad, const PoolRange& rows,
                             const PoolRange& columns, const T* row_factors, const T* column_factors, scalar_t* target,
                             int64_t in_last) {
  constexpr int64_t kLane = kLanes<T>;
  Vec<T> sum[kVectors] = {};
  for (int64_t oh = rows.begin; oh < rows.end; ++oh)
    for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
      const scalar_t* const from = grad + oh * p.pooled_stride[2] + ow * p.pooled_stride[3];
      const Vec<T> factor = splat(row_factors[oh] * column_factors[ow]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[v] = fma(v + 1 == kVectors ? load_some(from + v * kLane, in_last) : load(from + v * kLane), factor, sum[v]);
    }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kPast) {
      stream(target + v * kLane, sum[v]);
    } else {
      store_some(target + v * kLane, sum[v], v + 1 == kVectors ? in_last : kLane);
    }
  }
}

template <bool kPast, typename scalar_t>
void gather(const AvgPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t H = p.rows.size, W = p.columns.size, OH = p.rows.outputs, OW = p.columns.outputs;
  Buffer<PoolRange> columns(W);
  for (int64_t x = 0; x < W; ++x) columns[x] = p.columns.outputs_of(x);
  Buffer<T> row_factors(OH), column_factors(OW);
  for (int64_t o = 0; o < OH; ++o) row_factors[o] = T(1) / T(p.divisor_of(p.rows, true, o));
  for (int64_t o = 0; o < OW; ++o) column_factors[o] = T(1) / T(p.divisor_of(p.columns, false, o));
  parallel_for(p.N * H, max_of<int64_t>(1, kPiece / (p.C * W)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / H, y = i % H;
      const PoolRange rows = p.rows.outputs_of(y);
      const scalar_t* const grad = static_cast<const scalar_t*>(p.pooled) + n * p.pooled_stride[0];
      for (int64_t x = 0; x < W; ++x) {
        scalar_t* const target =
            static_cast<scalar_t*>(p.map) + n * p.map_stride[0] + y * p.map_stride[2] + x * p.map_stride[3];
        const auto pixel = [&]<int kVectors>(int64_t c) __attribute__((always_inline)) {
          gather_pixel<kVectors, kPast, scalar_t, T>(p, grad + c, rows, columns[x], row_factors.data(),
                                                     column_factors.data(), target + c,
                                                     p.C - c - (kVectors - 1) * kLane);
        };
        int64_t c = 0;
        for (; p.C - c > 3 * kLane; c += 4 * kLane) pixel.template operator()<4>(c);
        for (; c < p.C; c += kLane) pixel.template operator()<1>(c);
      }
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
    if (streams(static_cast<scalar_t*>(p.map), p.C, bytes)) return gather<true, scalar_t>(p);
    gather<false, scalar_t>(p);
  });
}

}  // namespace pvk::avg_pool2d::PVK_ISA
