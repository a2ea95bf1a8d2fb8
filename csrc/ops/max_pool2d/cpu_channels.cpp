// Max pooling of channels_last maps on the CPU, forward and backward: registers along channels.
//
// A task is rows of the output, or of the gradient. Forward, an output pixel's window is compared pixel by pixel.
// Backward, a pixel of the map looks at the windows that it is in, and takes the gradients of those that it won.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/pool_rows.h"
#include "core/stream.h"
#include "ops/max_pool2d/cpu_kernels.h"

namespace pvk::max_pool2d::PVK_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // elements of the map that a thread gets at least

PVK_INLINE Mask<float> load_places(const int32_t* source, int64_t count, float) {
  Mask<float> places{};
  if (count >= kLanes<float>) {
    std::memcpy(&places, source, sizeof(places));
  } else {
    for (int64_t i = 0; i < count; ++i) places[i] = source[i];
  }
  return places;
}
PVK_INLINE Mask<double> load_places(const int32_t* source, int64_t count, double) {
  Mask<double> places{};
  for (int64_t i = 0; i < kLanes<double> && i < count; ++i) places[i] = source[i];
  return places;
}

// kVectors registers of channels of one output pixel; `count` channels of the last are there. What the window after the
// next reads is asked for: strides from pixel to pixel are more than the hardware follows.
template <int kVectors, bool kPlaces, typename scalar_t>
PVK_INLINE void pool_pixel(const MaxPool2dParams& p, const scalar_t* map, const PoolRange& rows,
                           const PoolRange& columns, scalar_t* output, int32_t* places, int64_t count) {
  using T = opmath_t<scalar_t>;
  using P = place_t<T>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t W = p.columns.size, step = p.columns.dilation * p.map_stride[3];
  const int64_t in_last = count - (kVectors - 1) * kLane, ahead = 2 * p.columns.stride * p.map_stride[3];
  const bool none = rows.begin >= rows.end || columns.begin >= columns.end;
  Vec<T> best[kVectors];
  Mask<T> place[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    best[v] = splat(T(-__builtin_inf()));
    place[v] = Mask<T>{} + P(none ? -1 : rows.begin * W + columns.begin);
  }
  for (int64_t y = rows.begin; y < rows.end; y += p.rows.dilation) {
    const scalar_t* from = map + y * p.map_stride[2] + columns.begin * p.map_stride[3];
    Mask<T> here = Mask<T>{} + P(y * W + columns.begin);
    for (int64_t x = columns.begin; x < columns.end; x += p.columns.dilation) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> value = v + 1 == kVectors ? load_some(from + v * kLane, in_last) : load(from + v * kLane);
        __builtin_prefetch(from + v * kLane + ahead);
        take_larger<kPlaces>(best[v], place[v], value, here);
      }
      from += step;
      here += P(p.columns.dilation);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t lanes = v + 1 == kVectors ? in_last : kLane;
    store_some(output + v * kLane, best[v], lanes);
    if constexpr (kPlaces) store_places(places + v * kLane, place[v], lanes);
  }
}

template <bool kPlaces, typename scalar_t>
void pool(const MaxPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t OH = p.rows.outputs, OW = p.columns.outputs;
  Buffer<PoolRange> windows(OW);
  for (int64_t o = 0; o < OW; ++o) windows[o] = p.columns.window(o);
  const int64_t reads = p.C * max_of(p.rows.size / OH, int64_t(1)) * p.columns.size;
  parallel_for(p.N * OH, max_of<int64_t>(1, kPiece / max_of<int64_t>(1, reads)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / OH, oh = i % OH;
      const scalar_t* const map = static_cast<const scalar_t*>(p.map) + n * p.map_stride[0];
      const PoolRange rows = p.rows.window(oh);
      for (int64_t ow = 0; ow < OW; ++ow) {
        const int64_t at = n * p.pooled_stride[0] + oh * p.pooled_stride[2] + ow * p.pooled_stride[3];
        scalar_t* const output = static_cast<scalar_t*>(p.pooled) + at;
        int32_t* const places = kPlaces ? p.places + at : nullptr;
        int64_t c = 0;
        for (; p.C - c > 3 * kLane; c += 4 * kLane)
          pool_pixel<4, kPlaces>(p, map + c, rows, windows[ow], output + c, kPlaces ? places + c : nullptr,
                                 min_of(p.C - c, 4 * kLane));
        for (; c < p.C; c += kLane)
          pool_pixel<1, kPlaces>(p, map + c, rows, windows[ow], output + c, kPlaces ? places + c : nullptr,
                                 min_of(p.C - c, kLane));
      }
    }
  });
}

// kVectors registers of channels of one pixel of the map; `in_last` channels of the last are there. Past the caches
// where the gradient is larger than they are.
template <int kVectors, bool kPast, typename scalar_t, typename T>
PVK_INLINE void gather_pixel(const MaxPool2dParams& p, const scalar_t* grad, const int32_t* places,
                             const PoolRange& rows, const PoolRange& columns, Mask<T> here, scalar_t* target,
                             int64_t in_last) {
  constexpr int64_t kLane = kLanes<T>;
  Vec<T> sum[kVectors] = {};
  for (int64_t oh = rows.begin; oh < rows.end; ++oh)
    for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
      const int64_t at = oh * p.pooled_stride[2] + ow * p.pooled_stride[3];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t lanes = v + 1 == kVectors ? in_last : kLane, i = at + v * kLane;
        const Mask<T> won = load_places(places + i, lanes, T()) == here;
        sum[v] += (Vec<T>)((Mask<T>)load_some(grad + i, lanes) & won);
      }
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
void gather(const MaxPool2dParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t H = p.rows.size, W = p.columns.size;
  Buffer<PoolRange> columns(W);
  for (int64_t x = 0; x < W; ++x) columns[x] = p.columns.outputs_of(x);
  const int64_t work = max_of<int64_t>(1, p.C * W);
  parallel_for(p.N * H, max_of<int64_t>(1, kPiece / work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / H, y = i % H;
      const PoolRange rows = p.rows.outputs_of(y);
      const scalar_t* const grad = static_cast<const scalar_t*>(p.pooled) + n * p.pooled_stride[0];
      const int32_t* const places = p.places + n * p.pooled_stride[0];
      for (int64_t x = 0; x < W; ++x) {
        scalar_t* const target =
            static_cast<scalar_t*>(p.map) + n * p.map_stride[0] + y * p.map_stride[2] + x * p.map_stride[3];
        const Mask<T> here = Mask<T>{} + place_t<T>(y * W + x);
        int64_t c = 0;
        for (; p.C - c > 3 * kLane; c += 4 * kLane)
          gather_pixel<4, kPast, scalar_t, T>(p, grad + c, places + c, rows, columns[x], here, target + c,
                                              p.C - c - 3 * kLane);
        for (; c < p.C; c += kLane)
          gather_pixel<1, kPast, scalar_t, T>(p, grad + c, places + c, rows, columns[x], here, target + c, p.C - c);
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
    if (streams(static_cast<scalar_t*>(p.map), p.C, bytes)) return gather<true, scalar_t>(p);
    gather<false, scalar_t>(p);
  });
}

}  // namespace pvk::max_pool2d::PVK_ISA
