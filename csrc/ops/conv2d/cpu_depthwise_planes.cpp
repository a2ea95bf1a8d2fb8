// Depthwise convolution on the CPU, planes (NCHW): registers along W.
//
// A task owns a band of output rows of one input channel. It copies the input rows into a padded band, the columns of
// each residue modulo the stride together, so that every tap of a register of outputs is one contiguous load and no
// edge is left. A tile goes kRows outputs down: an input register is loaded once for all the rows that it is part of.
#include "core/buffer.h"
#include "core/epilogue.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/conv2d/cpu_depthwise.h"

namespace pvk::conv2d::PVK_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 7;  // the sizes of maps are mostly multiples of 7
#else
constexpr int kRows = 4;
#endif
constexpr int64_t kBandBytes = 16 << 10;
constexpr int64_t kTaskWork = 1 << 16;  // multiply-adds that a piece of work holds at least

struct Geometry {
  int64_t out_pitch;    // OW in whole registers
  int64_t phase_pitch;  // of the columns of one residue
  int64_t row_pitch;    // of all residues
  int64_t band;         // output rows of a task
  int64_t rows;         // input rows of a task, with what the last tile reads beyond
};

template <typename T>
Geometry geometry_of(const Conv2dParams& p) {
  constexpr int64_t kLane = kLanes<T>;
  Geometry g;
  g.out_pitch = ceil_div(p.OW, kLane) * kLane;
  g.phase_pitch = ceil_div(g.out_pitch + (p.S - 1) * p.dilation[1] / p.stride[1], kLane) * kLane;
  g.row_pitch = g.phase_pitch * p.stride[1];
  const int64_t fitting = (kBandBytes / (g.row_pitch * int64_t(sizeof(T))) - p.R) / p.stride[0];
  g.band = max_of(fitting / kRows, int64_t(1)) * kRows;
  g.rows = (min_of(g.band, ceil_div(p.OH, int64_t(kRows)) * kRows) - 1) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1;
  return g;
}

// One row of the band: column columns[i] of `source` to phase i % stride, place i / stride.
template <typename scalar_t, typename T>
void copy_row(const Conv2dParams& p, const Geometry& g, const scalar_t* source, const TapTable& columns, T* target) {
  const int64_t stride = p.stride[1], step = p.input_stride[3], needed = columns.needed();
  const int64_t first = max_of(int64_t(0), min_of(p.padding_left, needed));
  const int64_t last = max_of(first, min_of(p.padding_left + p.W, needed));
  const auto edge = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      target[i % stride * g.phase_pitch + i / stride] = columns[i] < 0 ? T(0) : T(to_float(source[columns[i] * step]));
  };
  edge(0, first);
  edge(last, needed);
  const scalar_t* inside = source + (first - p.padding_left) * step;
  const int64_t count = last - first;
  if (stride == 1 && step == 1) {
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(target + first + i, load(inside + i));
    if (i < count) store_first(target + first + i, load_first(inside + i, count - i), count - i);
    return;
  }
  for (int64_t start = 0; start < min_of(stride, count); ++start) {
    T* to = target + (first + start) % stride * g.phase_pitch + (first + start) / stride;
    const int64_t places = ceil_div(count - start, stride);
    for (int64_t j = 0; j < places; ++j) to[j] = to_float(inside[(start + stride * j) * step]);
  }
}

// kRows x one register of sums of a square kernel with rows next to each other. taps[s]: where tap s begins in a row.
template <int S, int kStride, typename T>
PVK_INLINE void convolve_tile(const T* band, int64_t row_pitch, const int64_t* taps, const T* weight, T* sums,
                              int64_t sums_pitch) {
  Vec<T> total[kRows];
#pragma GCC unroll 8
  for (int o = 0; o < kRows; ++o) total[o] = Vec<T>{};
#pragma GCC unroll 32
  for (int i = 0; i < (kRows - 1) * kStride + S; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const Vec<T> x = load(band + i * row_pitch + taps[s]);
#pragma GCC unroll 8
      for (int o = 0; o < kRows; ++o) {
        const int r = i - o * kStride;
        if (r >= 0 && r < S) total[o] = fma(x, splat(weight[r * S + s]), total[o]);
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kRows; ++o) store(sums + o * sums_pitch, total[o]);
}

// Any kernel: one output row at a time.
template <typename T>
PVK_INLINE void convolve_any_tile(const Conv2dParams& p, const T* band, int64_t row_pitch, const int64_t* taps,
                                  const T* weight, T* sums, int64_t sums_pitch) {
  for (int o = 0; o < kRows; ++o) {
    Vec<T> total{};
    for (int64_t r = 0; r < p.R; ++r) {
      const T* const row = band + (o * p.stride[0] + r * p.dilation[0]) * row_pitch;
      for (int64_t s = 0; s < p.S; ++s) total = fma(load(row + taps[s]), splat(weight[r * p.S + s]), total);
    }
    store(sums + o * sums_pitch, total);
  }
}

template <int S, int kStride, typename T>
void convolve_band(const Conv2dParams& p, const Geometry& g, const T* band, const int64_t* taps, const T* weight,
                   int64_t rows, T* sums) {
  for (int64_t row = 0; row < rows; row += kRows) {
    for (int64_t w = 0; w < g.out_pitch; w += kLanes<T>) {
      const T* const from = band + row * p.stride[0] * g.row_pitch + w;
      T* const to = sums + row * g.out_pitch + w;
      if constexpr (S > 0) {
        convolve_tile<S, kStride, T>(from, g.row_pitch, taps, weight, to, g.out_pitch);
      } else {
        convolve_any_tile<T>(p, from, g.row_pitch, taps, weight, to, g.out_pitch);
      }
    }
  }
}

template <typename T>
void convolve_band_of(const Conv2dParams& p, const Geometry& g, const T* band, const int64_t* taps, const T* weight,
                      int64_t rows, T* sums) {
  const bool plain = p.R == p.S && p.dilation[0] == 1 && (p.stride[0] == 1 || p.stride[0] == 2);
  switch (plain ? p.S * 2 + p.stride[0] - 1 : 0) {
    case 6:
      return convolve_band<3, 1, T>(p, g, band, taps, weight, rows, sums);
    case 7:
      return convolve_band<3, 2, T>(p, g, band, taps, weight, rows, sums);
    case 10:
      return convolve_band<5, 1, T>(p, g, band, taps, weight, rows, sums);
    case 11:
      return convolve_band<5, 2, T>(p, g, band, taps, weight, rows, sums);
    case 14:
      return convolve_band<7, 1, T>(p, g, band, taps, weight, rows, sums);
    default:
      return convolve_band<0, 0, T>(p, g, band, taps, weight, rows, sums);
  }
}

// The band's zeros times a weight that is not finite would be NaN: here only taps inside of the input count.
template <typename scalar_t, typename T>
void convolve_exactly(const Conv2dParams& p, const Geometry& g, const scalar_t* plane, const TapTable& rows,
                      const TapTable& columns, const T* weight, int64_t first, int64_t last, T* sums) {
  for (int64_t oh = first; oh < last; ++oh) {
    for (int64_t ow = 0; ow < p.OW; ++ow) {
      T total = 0;
      for (int64_t t = 0; t < p.R * p.S; ++t) {
        const int64_t row = rows[oh * p.stride[0] + t / p.S * p.dilation[0]];
        const int64_t column = columns[ow * p.stride[1] + t % p.S * p.dilation[1]];
        if (row >= 0 && column >= 0)
          total += T(to_float(plane[row * p.input_stride[2] + column * p.input_stride[3]])) * weight[t];
      }
      sums[(oh - first) * g.out_pitch + ow] = total;
    }
  }
}

// A row of sums to a row of values, in place, of the channel's scale and shift.
template <Activation kActivation, typename scalar_t, typename T>
void finish_row(T* sums, int64_t count, T scale, T shift, const scalar_t* residual, int64_t residual_stride) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    Vec<T> value = fma(load(sums + i), splat(scale), splat(shift));
    if (residual != nullptr) {
      const int64_t left = min_of(count - i, int64_t(kLanes<T>));
      value += residual_stride == 1 ? load_first(residual + i, left)
                                    : load_strided(residual + i * residual_stride, residual_stride, left);
    }
    store(sums + i, activate<kActivation, T>(value));
  }
}

template <typename scalar_t, typename T>
void store_row(const T* values, int64_t count, scalar_t* output, int64_t stride) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) output[i * stride] = from_float<scalar_t>(values[i]);
    return;
  }
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(output + i, load(values + i));
  if (i < count) store_first(output + i, load(values + i), count - i);
}

template <typename T>
bool all_finite(const T* values, int64_t count) {
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] * T(0);
  return sum == T(0);
}

}  // namespace

template <typename scalar_t>
void depthwise_planes(const Conv2dParams& p, const opmath_t<scalar_t>* weight, int64_t pitch) {
  using T = opmath_t<scalar_t>;
  const Epilogue<T> epilogue(p.K, p.bias, p.bias_dtype, p.scale, p.shift, p.scale_dtype, p.activation);
  const int64_t M = p.K / p.C, taps = p.R * p.S;
  const TapTable rows(p, 0, 0), columns(p, 1, 0);
  const Geometry g = geometry_of<T>(p);
  const int64_t OH = p.whole_rows(), step = p.pool ? ceil_div(g.band, int64_t(2)) * 2 : g.band;
  const int64_t bands = ceil_div(OH, step);
  const int64_t tiled_rows = ceil_div(step, int64_t(kRows)) * kRows;
  const int64_t band_rows = (tiled_rows - 1) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1;
  Buffer<int64_t> tap_places(p.S);
  for (int64_t s = 0; s < p.S; ++s) {
    const int64_t i = s * p.dilation[1];
    tap_places[s] = i % p.stride[1] * g.phase_pitch + i / p.stride[1];
  }

  const int64_t work = min_of(step, OH) * g.out_pitch * taps * M;
  parallel_for(p.N * p.C * bands, ceil_div(kTaskWork, work + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> band(band_rows * g.row_pitch), sums(tiled_rows * g.out_pitch), w(taps);
    __builtin_memset(band.data(), 0, size_t(band_rows * g.row_pitch) * sizeof(T));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands / p.C, c = task / bands % p.C;
      const int64_t first = task % bands * step, last = min_of(first + step, OH);
      const scalar_t* const plane =
          static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] + c * p.input_stride[1];
      const int64_t needed = (last - 1 - first) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1;
      for (int64_t i = 0; i < needed; ++i) {
        const int64_t row = rows[first * p.stride[0] + i];
        T* const target = band.data() + i * g.row_pitch;
        if (row < 0) {
          __builtin_memset(target, 0, size_t(g.row_pitch) * sizeof(T));
        } else {
          copy_row(p, g, plane + row * p.input_stride[2], columns, target);
        }
      }
      for (int64_t m = 0; m < M; ++m) {
        const int64_t k = c * M + m;
        for (int64_t t = 0; t < taps; ++t) w[t] = weight[(m * taps + t) * pitch + c];
        if (p.padding_mode != PaddingMode::kZeros || all_finite(w.data(), taps)) {
          convolve_band_of<T>(p, g, band.data(), tap_places.data(), w.data(), last - first, sums.data());
        } else {
          convolve_exactly(p, g, plane, rows, columns, w.data(), first, last, sums.data());
        }
        scalar_t* const output = static_cast<scalar_t*>(p.output) + n * p.output_stride[0] + k * p.output_stride[1];
        const scalar_t* residual = static_cast<const scalar_t*>(p.residual);
        if (residual != nullptr) residual += n * p.residual_stride[0] + k * p.residual_stride[1];
        const T scale = epilogue.scale()[k], shift = epilogue.shift()[k];
        with_activation(p.activation, [&](auto tag) __attribute__((always_inline)) {
          for (int64_t oh = first; oh < last; ++oh) {
            finish_row<decltype(tag)::value>(sums.data() + (oh - first) * g.out_pitch, p.OW, scale, shift,
                                             residual == nullptr ? nullptr : residual + oh * p.residual_stride[2],
                                             p.residual_stride[3]);
          }
        });
        if (!p.pool) {
          for (int64_t oh = first; oh < last; ++oh)
            store_row(sums.data() + (oh - first) * g.out_pitch, p.OW, output + oh * p.output_stride[2],
                      p.output_stride[3]);
          continue;
        }
        for (int64_t oh = first; oh < last; oh += 2) {
          T* const upper = sums.data() + (oh - first) * g.out_pitch;
          T* const lower = upper + g.out_pitch;
          for (int64_t i = 0; i < g.out_pitch; i += kLanes<T>)
            store(upper + i, pool_max<T>(load(upper + i), load(lower + i)));
          scalar_t* const target = output + oh / 2 * p.output_stride[2];
          for (int64_t i = 0; i < p.OW / 2; ++i) {
            const T left = upper[2 * i], right = upper[2 * i + 1];
            target[i * p.output_stride[3]] = from_float<scalar_t>(left > right || left != left ? left : right);
          }
        }
      }
    }
  });
}

template void depthwise_planes<float>(const Conv2dParams&, const float*, int64_t);
template void depthwise_planes<double>(const Conv2dParams&, const double*, int64_t);
template void depthwise_planes<Float16>(const Conv2dParams&, const float*, int64_t);
template void depthwise_planes<BFloat16>(const Conv2dParams&, const float*, int64_t);

}  // namespace pvk::conv2d::PVK_ISA
