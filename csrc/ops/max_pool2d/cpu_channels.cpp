// Max pooling of channels_last maps on the CPU, forward and backward: registers along channels.
//
// A task is a row of the output, or of the gradient, or some of its channels. Forward, an output pixel's window is
// compared pixel by pixel. Backward, a pixel of the map looks at the windows that it is in, and takes the gradients of
// those that it won.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/pool_channels.h"
#include "ops/max_pool2d/cpu_kernels.h"

namespace pvk::max_pool2d::PVK_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // elements of the map that a thread gets at least

// ---- places, in the order of a pair ----

template <typename scalar_t, typename T>
PVK_INLINE void store_places(int32_t* target, Mask<T> first, Mask<T> second, int64_t count, bool past) {
  if constexpr (kSplitsPairs<scalar_t>) {
    Vec<float> low, high;
    interleave<float>((Vec<float>)first, (Vec<float>)second, low, high);
    first = (Mask<T>)low;
    second = (Mask<T>)high;
  }
  if constexpr (sizeof(T) == sizeof(int32_t)) {
    if (past) {
      stream(reinterpret_cast<float*>(target), (Vec<T>)first);
      stream(reinterpret_cast<float*>(target) + kLanes<T>, (Vec<T>)second);
      return;
    }
  }
  max_pool2d::PVK_ISA::store_places(target, first, count);
  if (count > kLanes<T>) max_pool2d::PVK_ISA::store_places(target + kLanes<T>, second, count - kLanes<T>);
}

template <typename T>
PVK_INLINE Mask<T> load_some_places(const int32_t* source, int64_t count) {
  Mask<T> places{};
  if (sizeof(T) == sizeof(int32_t) && count >= kLanes<T>) {
    std::memcpy(&places, source, sizeof(places));
  } else {
    for (int64_t i = 0; i < kLanes<T> && i < count; ++i) places[i] = source[i];
  }
  return places;
}

template <typename scalar_t, typename T>
PVK_INLINE void load_places(const int32_t* source, Mask<T>& first, Mask<T>& second, int64_t count) {
  first = load_some_places<T>(source, count);
  second = load_some_places<T>(source + kLanes<T>, count - kLanes<T>);
  if constexpr (kSplitsPairs<scalar_t>) {
    const DeinterleaveMasks<float> order;
    const Mask<T> low = first, high = second;
    first = __builtin_shuffle(low, high, order.even);
    second = __builtin_shuffle(low, high, order.odd);
  }
}

// ---- forward ----

// Pixels of a window, or of some of its rows; steps count elements, and of places pixels.
template <typename P>
struct Taps {
  int64_t rows, columns, row_step, column_step;
  P row_places, column_places;
};

// What is known of a window of more rows than are read at once, at a pixel and channel of the output.
template <typename T>
struct Known {
  T* best;
  place_t<T>* places;
  bool first, last;
};

// kPairs of channels of one output pixel; `count` channels of the last are there. K is the side of the window, or 0.
template <int kPairs, bool kPlaces, bool kWhole, int K, typename scalar_t, typename T>
PVK_INLINE void pool_pixel(const Taps<place_t<T>>& taps, const scalar_t* from, place_t<T> place, const Known<T>& known,
                           scalar_t* output, int32_t* places, int64_t count, bool past, Ahead& ahead) {
  constexpr int64_t kStep = kPair<scalar_t>, kLane = kLanes<T>;
  const int64_t row_count = K > 0 ? K : taps.rows, column_count = K > 0 ? K : taps.columns;
  Pair<T> best[kPairs];
  Mask<T> first[kPairs], second[kPairs];
#pragma GCC unroll 4
  for (int v = 0; v < kPairs; ++v) {
    if (K > 0 || known.first) {
      best[v] = Pair<T>(T(-__builtin_inf()));
      first[v] = second[v] = Mask<T>{} + place;
    } else {
      best[v] = Pair<T>(load(known.best + v * kStep), load(known.best + v * kStep + kLane));
      if constexpr (kPlaces) {
        first[v] = load_mask<T>(known.places + v * kStep);
        second[v] = load_mask<T>(known.places + v * kStep + kLane);
      }
    }
  }
#pragma GCC unroll 3
  for (int64_t y = 0; y < row_count; ++y) {
    const scalar_t* at = from + y * taps.row_step;
    Mask<T> here = Mask<T>{} + place_t<T>(place + place_t<T>(y) * taps.row_places);
#pragma GCC unroll 3
    for (int64_t x = 0; x < column_count; ++x) {
#pragma GCC unroll 4
      for (int v = 0; v < kPairs; ++v) {
        const Pair<T> value = load_elements(at + v * kStep, kWhole || v + 1 < kPairs ? kStep : count);
        take_larger<kPlaces>(best[v].first, first[v], value.first, here);
        take_larger<kPlaces>(best[v].second, second[v], value.second, here);
      }
      ahead.ask(kLinesOf<scalar_t, kPairs>);
      at += taps.column_step;
      if constexpr (kPlaces) here += taps.column_places;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kPairs; ++v) {
    const int64_t elements = kWhole || v + 1 < kPairs ? kStep : count;
    if (K == 0 && !known.last) {
      store(known.best + v * kStep, best[v].first);
      store(known.best + v * kStep + kLane, best[v].second);
      if constexpr (kPlaces) {
        store_mask<T>(known.places + v * kStep, first[v]);
        store_mask<T>(known.places + v * kStep + kLane, second[v]);
      }
      continue;
    }
    if (kWhole && past) {
      stream_elements(output + v * kStep, best[v]);
    } else {
      store_elements(output + v * kStep, best[v], elements);
    }
    if constexpr (kPlaces) store_places<scalar_t, T>(places + v * kStep, first[v], second[v], elements, kWhole && past);
  }
}

template <bool kPlaces, typename scalar_t>
void pool(const MaxPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  using P = place_t<T>;
  constexpr int64_t kStep = kPair<scalar_t>;
  const int64_t OH = p.rows.outputs, OW = p.columns.outputs, W = p.columns.size;
  ChannelsMap<scalar_t> map(p.map, p.N, p.C, p.map_stride, p.rows, p.columns);
  const int64_t part = channels_of_part<scalar_t>(p.C, p.N * OH), parts = ceil_div(p.C, part);
  map.asks = map.asks && parts == 1;
  Buffer<PoolRange> windows(OW);
  for (int64_t o = 0; o < OW; ++o) windows[o] = p.columns.window(o);
  const bool small = p.rows.kernel == p.columns.kernel && p.rows.dilation == 1 && p.columns.dilation == 1;
  const int64_t bytes = p.N * p.C * OH * OW * int64_t(sizeof(scalar_t));
  const bool past = p.C % kStep == 0 && streams(static_cast<scalar_t*>(p.pooled), p.C, bytes) &&
                    (!kPlaces || streams(p.places, p.C, bytes * 4));
  const int64_t pitch = ceil_div(part, kStep) * kStep;
  const int64_t reads = part * max_of(p.rows.size / OH, int64_t(1)) * W;
  parallel_for(
      p.N * OH * parts, max_of<int64_t>(1, kPiece / max_of<int64_t>(1, reads)), [&](int64_t begin, int64_t end) {
        Buffer<T> best;
        Buffer<P> places_so_far;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / parts / OH, oh = i / parts % OH, c0 = i % parts * part, c1 = min_of(c0 + part, p.C);
          map.for_groups(n, oh, [&](const PoolRange& rows, bool first, bool last, Ahead ahead) {
            const int64_t row_taps = max_of<int64_t>(0, ceil_div(rows.end - rows.begin, p.rows.dilation));
            if (!(first && last)) {
              best.reserve(OW * pitch);
              if (kPlaces) places_so_far.reserve(OW * pitch);
            }
            for (int64_t ow = 0; ow < OW; ++ow) {
              const PoolRange& columns = windows[ow];
              const int64_t column_taps = max_of<int64_t>(0, ceil_div(columns.end - columns.begin, p.columns.dilation));
              const Taps<P> taps{row_taps,
                                 column_taps,
                                 p.rows.dilation * p.map_stride[2],
                                 p.columns.dilation * p.C,
                                 P(p.rows.dilation * W),
                                 P(p.columns.dilation)};
              const bool none = row_taps == 0 || column_taps == 0;
              const P place = none ? P(-1) : P(rows.begin * W + columns.begin);
              const scalar_t* const from =
                  none ? map.data : map.data + n * p.map_stride[0] + rows.begin * p.map_stride[2] + columns.begin * p.C;
              const int64_t at = n * p.pooled_stride[0] + oh * p.pooled_stride[2] + ow * p.pooled_stride[3];
              scalar_t* const output = static_cast<scalar_t*>(p.pooled) + at;
              const auto channels = [&]<int K>() __attribute__((always_inline)) {
                for_channels<scalar_t>(
                    c0, c1, [&]<int kPairs, bool kWhole>(int64_t c, int64_t count) __attribute__((always_inline)) {
                      const int64_t kept = ow * pitch + c - c0;
                      const bool whole = first && last;
                      const Known<T> known{whole ? nullptr : best.data() + kept,
                                           whole || !kPlaces ? nullptr : places_so_far.data() + kept, first, last};
                      pool_pixel<kPairs, kPlaces, kWhole, K, scalar_t, T>(taps, from + c, place, known, output + c,
                                                                          kPlaces ? p.places + at + c : nullptr, count,
                                                                          past, ahead);
                    });
              };
              if (small && row_taps == 2 && column_taps == 2 && first && last) {
                channels.template operator()<2>();
              } else if (small && row_taps == 3 && column_taps == 3 && first && last) {
                channels.template operator()<3>();
              } else {
                channels.template operator()<0>();
              }
            }
          });
        }
        if (past) end_of_streams();
      });
}

// ---- backward ----

// kPairs of channels of one pixel of the map, the last with `count`. Past the caches where the gradient is larger than
// they are.
template <int kPairs, bool kWhole, bool kPast, typename scalar_t, typename T>
PVK_INLINE void gather_pixel(const MaxPool2dParams& p, const scalar_t* grad, const int32_t* places,
                             const PoolRange& rows, const PoolRange& columns, Mask<T> here, scalar_t* target,
                             int64_t count) {
  constexpr int64_t kStep = kPair<scalar_t>;
  Pair<T> sum[kPairs];
  for (int64_t oh = rows.begin; oh < rows.end; ++oh)
    for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
      const int64_t at = oh * p.pooled_stride[2] + ow * p.pooled_stride[3];
#pragma GCC unroll 4
      for (int v = 0; v < kPairs; ++v) {
        const int64_t elements = kWhole || v + 1 < kPairs ? kStep : count, i = at + v * kStep;
        Mask<T> first, second;
        load_places<scalar_t, T>(places + i, first, second, elements);
        const Pair<T> value = load_elements(grad + i, elements);
        sum[v].first += (Vec<T>)((Mask<T>)value.first & (first == here));
        sum[v].second += (Vec<T>)((Mask<T>)value.second & (second == here));
      }
    }
#pragma GCC unroll 4
  for (int v = 0; v < kPairs; ++v) {
    if constexpr (kPast && kWhole) {
      stream_elements(target + v * kStep, sum[v]);
    } else {
      store_elements(target + v * kStep, sum[v], kWhole || v + 1 < kPairs ? kStep : count);
    }
  }
}

template <bool kPast, typename scalar_t>
void gather(const MaxPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  const int64_t H = p.rows.size, W = p.columns.size;
  Buffer<PoolRange> columns(W);
  for (int64_t x = 0; x < W; ++x) columns[x] = p.columns.outputs_of(x);
  const int64_t work = max_of<int64_t>(1, p.C * W);
  const bool asks = p.N * H * p.C * W * int64_t(sizeof(scalar_t)) >= kLeastAhead;
  parallel_for(p.N * H, max_of<int64_t>(1, kPiece / work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / H, y = i % H;
      const PoolRange rows = p.rows.outputs_of(y);
      const scalar_t* const grad = static_cast<const scalar_t*>(p.pooled) + n * p.pooled_stride[0];
      const int32_t* const places = p.places + n * p.pooled_stride[0];
      Ahead more_grads, more_places;
      if (asks) {
        more_grads = ahead_of_outputs(p.rows, grad, p.pooled_stride, y, n + 1 == p.N);
        more_places = ahead_of_outputs(p.rows, places, p.pooled_stride, y, n + 1 == p.N);
      }
      for (int64_t x = 0; x < W; ++x) {
        scalar_t* const target =
            static_cast<scalar_t*>(p.map) + n * p.map_stride[0] + y * p.map_stride[2] + x * p.map_stride[3];
        const Mask<T> here = Mask<T>{} + place_t<T>(y * W + x);
        for_channels<scalar_t>(0, p.C,
                               [&]<int kPairs, bool kWhole>(int64_t c, int64_t count) __attribute__((always_inline)) {
                                 more_grads.ask(kLinesOf<scalar_t, kPairs>);
                                 more_places.ask(kLinesOf<int32_t, kPairs>);
                                 gather_pixel<kPairs, kWhole, kPast, scalar_t, T>(p, grad + c, places + c, rows,
                                                                                  columns[x], here, target + c, count);
                               });
      }
    }
    if constexpr (kPast) end_of_streams();
  });
}

}  // namespace

void forward_channels(const MaxPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (p.places == nullptr) return pool<false, scalar_t>(p);
    pool<true, scalar_t>(p);
  });
}

void backward_channels(const MaxPool2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const int64_t bytes = p.N * p.C * p.rows.size * p.columns.size * int64_t(sizeof(scalar_t));
    if (p.C % kPair<scalar_t> == 0 && streams(static_cast<scalar_t*>(p.map), p.C, bytes))
      return gather<true, scalar_t>(p);
    gather<false, scalar_t>(p);
  });
}

}  // namespace pvk::max_pool2d::PVK_ISA
