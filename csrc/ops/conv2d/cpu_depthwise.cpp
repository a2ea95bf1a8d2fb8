// Depthwise convolution on the CPU, channels_last, registers along C; and the choice between it and planes (NCHW).
//
// A task owns a band of output rows at a block of channels, and goes down it by columns of tiles: the input rows of a
// tile stay in the first-level cache until the next row of tiles has used them.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/epilogue.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/transpose.h"
#include "ops/conv2d/depthwise.h"

namespace pvk::conv2d::PVK_ISA {
namespace {

// Output columns of a register tile. AVX2's 16 registers hold 8 sums, a row of up to 7 weights and an input.
constexpr int kColumns = 8;
constexpr int64_t kBlockBytes = 20 << 10;  // of the input rows that a column of tiles keeps in the first-level cache

// kColumns outputs of a row, at a block of channels.
template <typename scalar_t>
struct Tile {
  using T = opmath_t<scalar_t>;
  const scalar_t* input;
  const T* weight;         // [R * S][pitch]
  const int64_t* rows;     // tap r reads rows[r * row_step]
  const int64_t* columns;  // tap s of output o reads columns[o * stride + s * column_step]
  int64_t R, S, row_step, column_step, stride, pitch;
};

// A row of taps: each input register is loaded once and goes into every sum that it is part of.
template <int S, int kStride, typename T, typename scalar_t>
PVK_INLINE void add_row(Vec<T>* sums, const scalar_t* row, const int64_t* columns, const T* weight, int64_t pitch) {
  Vec<T> w[S];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) w[s] = load(weight + s * pitch);
#pragma GCC unroll 32
  for (int i = 0; i < (kColumns - 1) * kStride + S; ++i) {
    if (columns[i] < 0) continue;
    const Vec<T> x = load(row + columns[i]);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      if (i >= s && (i - s) % kStride == 0 && (i - s) / kStride < kColumns)
        sums[(i - s) / kStride] = fma(x, w[s], sums[(i - s) / kStride]);
    }
  }
}

// The same for any kernel size, stride and dilation.
template <typename T, typename scalar_t>
PVK_INLINE void add_any_row(Vec<T>* sums, const scalar_t* row, const Tile<scalar_t>& tile, const T* weight) {
  for (int64_t s = 0; s < tile.S; ++s) {
    const Vec<T> w = load(weight + s * tile.pitch);
    const int64_t* column = tile.columns + s * tile.column_step;
#pragma GCC unroll 8
    for (int o = 0; o < kColumns; ++o, column += tile.stride)
      if (*column >= 0) sums[o] = fma(load(row + *column), w, sums[o]);
  }
}

template <int S, int kStride, typename T, typename scalar_t>
PVK_INLINE void convolve(Vec<T>* sums, const Tile<scalar_t>& tile, int64_t c) {
#pragma GCC unroll 8
  for (int o = 0; o < kColumns; ++o) sums[o] = Vec<T>{};
  for (int64_t r = 0; r < tile.R; ++r) {
    const int64_t row = tile.rows[r * tile.row_step];
    if (row < 0) continue;
    const scalar_t* x = tile.input + row + c;
    const T* w = tile.weight + r * tile.S * tile.pitch + c;
    if constexpr (S > 0) {
      add_row<S, kStride, T>(sums, x, tile.columns, w, tile.pitch);
    } else {
      add_any_row<T>(sums, x, tile, w);
    }
  }
}

// Registers of `channels` >= kLanes, the last one overlapping the one before.
template <typename T, typename Body>
PVK_INLINE void for_registers(int64_t channels, const Body& body) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) body(c + kLanes<T> <= channels ? c : channels - kLanes<T>);
}

// Where a tile's outputs go, from registers: [count] pixels, `pitch` apart.
template <typename scalar_t>
struct Outputs {
  using T = opmath_t<scalar_t>;
  scalar_t* output;
  const T *scale, *shift;
  int64_t pitch;
  int count;
};

template <int S, int kStride, typename scalar_t, typename T>
void convolve_and_finish(const Tile<scalar_t>& tile, int64_t channels, const Outputs<scalar_t>& out,
                         const CheapActivation<T>& activation) {
  for_registers<T>(channels, [&](int64_t c) __attribute__((always_inline)) {
    Vec<T> sums[kColumns];
    convolve<S, kStride, T>(sums, tile, c);
    const Vec<T> scale = load(out.scale + c), shift = load(out.shift + c);
    scalar_t* target = out.output + c;
    if (activation.is_hardswish) {
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o, target += out.pitch)
        if (o < out.count) store(target, finish<Activation::kHardswish, T>(sums[o], scale, shift));
    } else {
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o, target += out.pitch)
        if (o < out.count) store(target, activation.clamp(fma(sums[o], scale, shift)));
    }
  });
}

// buffer[o][c * M + m] = the sums, for one m; `pitch` from one output to the next.
template <int S, int kStride, typename scalar_t, typename T>
void convolve_to_buffer(const Tile<scalar_t>& tile, int64_t channels, T* buffer, int64_t pitch, int64_t M) {
  for_registers<T>(channels, [&](int64_t c) __attribute__((always_inline)) {
    Vec<T> sums[kColumns];
    convolve<S, kStride, T>(sums, tile, c);
    T* target = buffer + c * M;
    if (M == 1) {
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o) store(target + o * pitch, sums[o]);
    } else {
      T lanes[kColumns][kLanes<T>];
#pragma GCC unroll 8
      for (int o = 0; o < kColumns; ++o) store(lanes[o], sums[o]);
      for (int o = 0; o < kColumns; ++o)
        for (int i = 0; i < kLanes<T>; ++i) target[o * pitch + i * M] = lanes[o][i];
    }
  });
}

// rows [2][columns][pitch] of finished outputs to [columns / 2] pooled ones.
template <typename scalar_t>
void pool_tile(const scalar_t* rows, int64_t row_pitch, int64_t pitch, int64_t columns, int64_t channels,
               scalar_t* output, int64_t output_pitch) {
  using T = opmath_t<scalar_t>;
  for (int64_t o = 0; o + 1 < columns; o += 2, rows += 2 * pitch, output += output_pitch) {
    for_registers<T>(channels, [&](int64_t c) __attribute__((always_inline)) {
      const scalar_t* x = rows + c;
      const Vec<T> upper = pool_max<T>(load(x), load(x + pitch));
      const Vec<T> lower = pool_max<T>(load(x + row_pitch), load(x + row_pitch + pitch));
      store(output + c, pool_max<T>(upper, lower));
    });
  }
}

// Blocks of whole registers, but for the last one, which takes the rest.
struct Blocks {
  int64_t total, size, count;

  Blocks(int64_t total, int64_t wanted, int64_t lanes) : total(total) {
    const int64_t parts = max_of(int64_t(1), (total + wanted / 2) / wanted);
    size = max_of(total / parts / lanes * lanes, lanes);
    count = max_of(int64_t(1), min_of(parts, total / size));
  }
  int64_t begin(int64_t i) const { return i * size; }
  int64_t end(int64_t i) const { return i + 1 == count ? total : (i + 1) * size; }
};

template <int S, int kStride, typename scalar_t>
void run(const Conv2dParams& p, const opmath_t<scalar_t>* weight) {
  using T = opmath_t<scalar_t>;
  const scalar_t* const input = static_cast<const scalar_t*>(p.input);
  const scalar_t* const residual = static_cast<const scalar_t*>(p.residual);
  scalar_t* const output = static_cast<scalar_t*>(p.output);
  const Epilogue<T> epilogue(p.K, p.bias, p.bias_dtype, p.scale, p.shift, p.scale_dtype, p.activation);
  const CheapActivation<T> activation(p.activation);
  const int64_t M = p.K / p.C;
  const bool direct = M == 1 && !p.pool && residual == nullptr && activation.is_cheap;

  const TapOffsets rows(p, 0, 0), columns(p, 1, kColumns * p.stride[1]);
  const int64_t tile_width = (kColumns - 1) * p.stride[1] + (p.S - 1) * p.dilation[1] + 1;
  const Blocks blocks(p.C, kBlockBytes / (p.R * tile_width * int64_t(sizeof(scalar_t))) + 1, kLanes<T>);
  const int64_t OH = p.pool ? p.OH / 2 * 2 : p.OH, OW = p.pool ? p.OW / 2 * 2 : p.OW;
  const int64_t wanted = ceil_div(thread_count() * 6, max_of(int64_t(1), p.N * blocks.count));
  const int64_t band = thread_count() == 1 ? OH : max_of(int64_t(4), ceil_div(ceil_div(OH, wanted), int64_t(2)) * 2);
  const int64_t bands = ceil_div(OH, band);

  parallel_for(p.N * bands * blocks.count, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> sums;
    Buffer<scalar_t> finished;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (bands * blocks.count), b = task % blocks.count;
      const int64_t first = task / blocks.count % bands * band, last = min_of(first + band, OH);
      const int64_t c = blocks.begin(b), channels = blocks.end(b) - c;
      const int64_t pitch = ceil_div(channels * M, int64_t(kLanes<T>)) * kLanes<T>;
      if (!direct) sums.reserve(kColumns * pitch);
      if (p.pool) finished.reserve(2 * kColumns * pitch);
      Tile<scalar_t> tile{input + n * p.input_stride[0] + c, nullptr, nullptr,         nullptr,     p.R, p.S,
                          p.dilation[0],                     p.dilation[1], p.stride[1], p.C};
      for (int64_t ow = 0; ow < OW; ow += kColumns) {
        tile.columns = columns.data() + ow * p.stride[1];
        const int64_t count = min_of(int64_t(kColumns), OW - ow);
        for (int64_t oh = first; oh < last; ++oh) {
          tile.rows = rows.data() + oh * p.stride[0];
          tile.weight = weight + c;
          scalar_t* const image = output + n * p.output_stride[0] + c * M;
          if (direct) {
            const Outputs<scalar_t> out{image + oh * p.output_stride[2] + ow * p.output_stride[3],
                                        epilogue.scale() + c, epilogue.shift() + c, p.output_stride[3], int(count)};
            convolve_and_finish<S, kStride>(tile, channels, out, activation);
            continue;
          }
          for (int64_t m = 0; m < M; ++m, tile.weight += p.R * p.S * p.C)
            convolve_to_buffer<S, kStride>(tile, channels, sums.data() + m, pitch, M);
          FinishRows<scalar_t> to{};
          to.sums = sums.data();
          to.sums_pitch = pitch;
          to.output = p.pool ? finished.data() + oh % 2 * kColumns * pitch
                             : image + oh * p.output_stride[2] + ow * p.output_stride[3];
          to.output_pitch = p.pool ? pitch : p.output_stride[3];
          if (residual != nullptr) {
            const int64_t* stride = p.residual_stride;
            to.residual = residual + n * stride[0] + c * M * stride[1] + oh * stride[2] + ow * stride[3];
            to.residual_pitch = stride[3];
            to.residual_channel_stride = stride[1];
          }
          to.rows = count;
          to.first = c * M;
          to.channels = channels * M;
          finish_rows(epilogue, to);
          if (p.pool && oh % 2 == 1)
            pool_tile(finished.data(), kColumns * pitch, pitch, count, channels * M,
                      image + oh / 2 * p.output_stride[2] + ow / 2 * p.output_stride[3], p.output_stride[3]);
        }
      }
    }
  });
}

template <typename scalar_t>
void pack(const Conv2dParams& p, opmath_t<scalar_t>* target) {
  const int64_t M = p.K / p.C, taps = p.R * p.S;
  const int64_t* stride = p.weight_stride;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t t = 0; t < taps; ++t, target += p.C) {
      const scalar_t* source = static_cast<const scalar_t*>(p.weight) + m * stride[0] + t / p.S * stride[2] +
                               t % p.S * stride[3];
      for (int64_t c = 0; c < p.C; ++c) target[c] = to_float(source[c * M * stride[0]]);
    }
  }
}

template <typename scalar_t>
void forward_typed(const Conv2dParams& p) {
  using T = opmath_t<scalar_t>;
  const T* weight = static_cast<const T*>(p.packed);
  Buffer<T> packed;
  if (weight == nullptr) {
    packed.reserve(p.K * p.R * p.S);
    pack<scalar_t>(p, packed.data());
    weight = packed.data();
  }
  // A map of one pixel, or of one channel, has either layout.
  const bool channels_last = p.C >= kLanes<T> && (p.output_stride[1] == 1 || p.K == 1);
  const bool fits = channels_last ? p.input_stride[1] == 1 : p.input_stride[3] == 1;
  Buffer<scalar_t> turned;
  Conv2dParams inner = p;
  if (!fits) {
    turned.reserve(p.N * p.C * p.H * p.W);
    inner.input = turned.data();
    inner.input_stride[0] = p.C * p.H * p.W;
    inner.input_stride[1] = channels_last ? 1 : p.H * p.W;
    inner.input_stride[2] = channels_last ? p.W * p.C : p.W;
    inner.input_stride[3] = channels_last ? p.C : 1;
    const int64_t* from = p.input_stride;
    const int64_t* to = inner.input_stride;
    constexpr int64_t kSide = 64;
    const int64_t blocks = ceil_div(p.C, kSide);
    parallel_for(p.N * p.H * blocks, 8, [&](int64_t begin, int64_t end) {
      alignas(64) T tile[kSide * kSide];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / blocks / p.H, h = i / blocks % p.H, c = i % blocks * kSide;
        const int64_t channels = min_of(kSide, p.C - c);
        for (int64_t w = 0; w < p.W; w += kSide) {
          const int64_t pixels = min_of(kSide, p.W - w);
          const scalar_t* source = static_cast<const scalar_t*>(p.input) + n * from[0] + c * from[1] + h * from[2] +
                                   w * from[3];
          scalar_t* target = turned.data() + n * to[0] + c * to[1] + h * to[2] + w * to[3];
          load_tile(tile, kSide, source, from[1], from[3], channels, pixels);
          store_tile(target, tile, kSide, to[1], to[3], channels, pixels);
        }
      }
    });
  }
  if (channels_last) {
    depthwise_channels_last<scalar_t>(inner, weight);
  } else {
    depthwise_planes<scalar_t>(inner, weight);
  }
}

}  // namespace

template <typename scalar_t>
void depthwise_channels_last(const Conv2dParams& p, const opmath_t<scalar_t>* weight) {
  const bool plain = p.dilation[1] == 1 && (p.stride[1] == 1 || p.stride[1] == 2);
  const int64_t key = plain ? p.S * 2 + p.stride[1] - 1 : 0;
  switch (key) {
    case 6:
      return run<3, 1, scalar_t>(p, weight);
    case 7:
      return run<3, 2, scalar_t>(p, weight);
    case 10:
      return run<5, 1, scalar_t>(p, weight);
    case 11:
      return run<5, 2, scalar_t>(p, weight);
    case 14:
      return run<7, 1, scalar_t>(p, weight);
    case 15:
      return run<7, 2, scalar_t>(p, weight);
    default:
      return run<0, 0, scalar_t>(p, weight);
  }
}

void forward_depthwise(const Conv2dParams& p) {
  if (p.N == 0 || p.K == 0 || p.OH <= 0 || p.OW <= 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) { forward_typed<decltype(scalar)>(p); });
}

int64_t packed_bytes_depthwise(const Conv2dParams& p) {
  return p.K * p.R * p.S * int64_t(p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

void pack_depthwise(const PackParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    pack<scalar_t>(p, static_cast<opmath_t<scalar_t>*>(p.target));
  });
}

}  // namespace pvk::conv2d::PVK_ISA
