// Depthwise convolution on the CPU, channels_last, registers along C; and the choice between it and planes (NCHW).
//
// A task owns a band of output rows at a block of channels, and goes down it by columns of tiles: the input rows of a
// tile stay in the first-level cache until the next row of tiles has used them. Maps of another layout, and those of
// 16 bits, are brought into scratch first, a band at a time; then it is the same kernel.
#include "ops/conv2d/cpu_depthwise.h"
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/epilogue.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/transpose.h"
#include "ops/conv2d/cpu_depthwise_tile.h"

namespace pvk::conv2d::PVK_ISA {
namespace {

constexpr int64_t kBlockBytes = 20 << 10;    // of the input rows that a column of tiles keeps in the first-level cache
constexpr int64_t kCachedBytes = 640 << 10;  // of a map that the second-level cache has from who wrote it
constexpr int64_t kNearBytes = 4 << 20;      // of a map that is not read from memory
constexpr int64_t kTurnedBytes = 256 << 10;  // of the input that a task turns into scratch
constexpr int64_t kBandOutputs = 64 << 10;   // that a task writes, about
constexpr int64_t kStreamedBytes = 5 << 20;  // of outputs that go past the caches
constexpr int64_t kSmallWork = 1 << 18;      // multiply-adds that waking a thread is not worth

// Whether outputs are whole lines, and too many to be found in a cache by what reads them.
template <typename scalar_t>
bool streams_outputs(const Conv2dParams& p) {
  constexpr int64_t kLine = 64, kSize = sizeof(scalar_t);
  if (kRegisterBytes != kLine || kSize < 4 || p.N * p.K * p.OH * p.OW * kSize < kStreamedBytes) return false;
  const int64_t offsets = p.output_stride[0] | p.output_stride[2] | p.output_stride[3] | p.C;
  return (offsets * kSize | int64_t(reinterpret_cast<uintptr_t>(p.output))) % kLine == 0;
}

// rows [2][columns][pitch] of finished outputs to [columns / 2] pooled ones.
template <typename scalar_t>
void pool_tile(const scalar_t* rows, int64_t row_pitch, int64_t pitch, int64_t columns, int64_t channels,
               scalar_t* output, int64_t output_pitch) {
  using T = opmath_t<scalar_t>;
  for (int64_t o = 0; o + 1 < columns; o += 2, rows += 2 * pitch, output += output_pitch) {
    for_registers<T>(channels, [&](int64_t c) __attribute__((always_inline)) {
      store(output + c, pool_window(rows + c, rows + row_pitch + c, pitch));
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
  int64_t largest() const { return end(count - 1) - begin(count - 1); }
};

// What the tasks of a call share.
template <typename scalar_t>
struct Call {
  using T = opmath_t<scalar_t>;
  const Conv2dParams& p;
  const T* weight;
  int64_t pitch;  // of the packed weight
  const int64_t *rows, *columns;
  const Epilogue<T>& epilogue;
  const CheapActivation<T>& activation;
  int64_t M;
  bool streams, prefetches, by_rows;
};

// A band of output rows of a block of channels, both channels_last.
template <typename scalar_t>
struct Band {
  const opmath_t<scalar_t>* input;  // of the block's first channel, at the row and column of offset 0
  scalar_t* output;                 // of the block's first channel, at row 0
  int64_t output_row, output_pixel;
  const scalar_t* residual;  // the same, of the strides of p, or null
  int64_t c, channels, first, last;
};

template <int S, int kStride, typename scalar_t>
void convolve_band(const Call<scalar_t>& call, const Band<scalar_t>& band, Buffer<opmath_t<scalar_t>>& sums,
                   Buffer<scalar_t>& finished) {
  using T = opmath_t<scalar_t>;
  const Conv2dParams& p = call.p;
  const int64_t outputs = band.channels * call.M, OW = p.whole_columns();
  const bool direct = call.M == 1 && !p.pool && p.residual == nullptr && call.activation.is_cheap;
  const int64_t pitch = ceil_div(outputs, int64_t(kLanes<T>)) * kLanes<T> * (call.M > 1 ? call.M : 1);
  if (!direct) sums.reserve(kColumns * pitch);
  if (p.pool) finished.reserve(2 * kColumns * pitch);
  DepthwiseTile<T> tile;
  tile.input = band.input;
  tile.R = p.R;
  tile.S = p.S;
  tile.row_step = p.dilation[0];
  tile.column_step = p.dilation[1];
  tile.stride = p.stride[1];
  tile.pitch = call.pitch;
  DepthwiseOutputs<scalar_t> out{};
  out.pitch = band.output_pixel;
  out.scale = call.epilogue.scale() + band.c;
  out.shift = call.epilogue.shift() + band.c;
  out.sums_pitch = pitch;
  out.M = call.M;
  out.streams = call.streams;
  // By columns of tiles the input rows of a tile stay in the first-level cache. By rows memory is read in order.
  const bool by_rows = call.by_rows && !p.pool;
  int64_t oh = band.first, ow = 0;
  const auto advance = [&]() __attribute__((always_inline)) {
    if (by_rows) {
      ow += kColumns;
      if (ow >= OW) ow = 0, ++oh;
    } else if (++oh == band.last) {
      oh = band.first;
      ow += kColumns;
    }
  };
  for (; oh < band.last && ow < OW; advance()) {
    tile.columns = call.columns + ow * p.stride[1];
    out.count = int(min_of(int64_t(kColumns), OW - ow));
    tile.rows = call.rows + oh * p.stride[0];
    tile.weight = call.weight + band.c;
    tile.ahead = tile.rows + (p.R - 1) * p.dilation[0] + 1;
    tile.ahead_columns = tile.columns;
    tile.ahead_count = oh + 1 < band.last ? p.stride[0] : 0;
    tile.ahead_step = 1;
    if (!by_rows && oh + 1 == band.last && ow + kColumns < OW) {
      tile.ahead = call.rows + band.first * p.stride[0];
      tile.ahead_columns += kColumns * p.stride[1];
      tile.ahead_count = p.R;
      tile.ahead_step = p.dilation[0];
    }
    if (!call.prefetches) tile.ahead_count = 0;
    scalar_t* const target = band.output + oh * band.output_row + ow * band.output_pixel;
    if (direct) {
      out.output = target;
      convolve_tile<S, kStride>(tile, band.channels, out, call.activation);
      continue;
    }
    for (int64_t m = 0; m < call.M; ++m, tile.weight += p.R * p.S * call.pitch) {
      out.sums = sums.data() + m;
      convolve_tile<S, kStride>(tile, band.channels, out, call.activation);
    }
    FinishRows<scalar_t> to{};
    to.sums = sums.data();
    to.sums_pitch = pitch;
    to.output = p.pool ? finished.data() + oh % 2 * kColumns * pitch : target;
    to.output_pitch = p.pool ? pitch : band.output_pixel;
    if (band.residual != nullptr) {
      to.residual = band.residual + oh * p.residual_stride[2] + ow * p.residual_stride[3];
      to.residual_pitch = p.residual_stride[3];
      to.residual_channel_stride = p.residual_stride[1];
    }
    to.rows = out.count;
    to.first = band.c * call.M;
    to.channels = outputs;
    finish_rows(call.epilogue, to);
    if (p.pool && oh % 2 == 1)
      pool_tile(finished.data(), kColumns * pitch, pitch, out.count, outputs,
                band.output + oh / 2 * band.output_row + ow / 2 * band.output_pixel, band.output_pixel);
  }
}

template <typename scalar_t>
using ConvolveBand = void (*)(const Call<scalar_t>&, const Band<scalar_t>&, Buffer<opmath_t<scalar_t>>&,
                              Buffer<scalar_t>&);

template <typename scalar_t>
ConvolveBand<scalar_t> choose(const Conv2dParams& p) {
  const bool plain = p.dilation[1] == 1 && (p.stride[1] == 1 || p.stride[1] == 2);
  switch (plain ? p.S * 2 + p.stride[1] - 1 : 0) {
    case 6:
      return convolve_band<3, 1, scalar_t>;
    case 7:
      return convolve_band<3, 2, scalar_t>;
    case 10:
      return convolve_band<5, 1, scalar_t>;
    case 11:
      return convolve_band<5, 2, scalar_t>;
    case 14:
      return convolve_band<7, 1, scalar_t>;
    case 15:
      return convolve_band<7, 2, scalar_t>;
    default:
      return convolve_band<0, 0, scalar_t>;
  }
}

int64_t tile_width(const Conv2dParams& p) {  // input columns that a tile reads
  return (kColumns - 1) * p.stride[1] + (p.S - 1) * p.dilation[1] + 1;
}

// Tasks to a piece of work: all of them where waking a thread is not worth it.
int64_t tasks_together(const Conv2dParams& p, int64_t tasks) {
  return p.N * p.K * p.OH * p.OW * p.R * p.S < kSmallWork ? tasks : 1;
}

// An even number of rows to a band: several tasks to a thread, and outputs that are written about in order, which pages
// that are new like.
int64_t band_of(const Conv2dParams& p, int64_t blocks, int64_t row_outputs) {
  const int64_t OH = p.whole_rows(), threads = thread_count();
  const int64_t wanted = ceil_div(threads * 6, max_of(int64_t(1), p.N * blocks));
  const int64_t fair = threads == 1 ? OH : ceil_div(OH, wanted);
  const int64_t longest = kBandOutputs / max_of(row_outputs, int64_t(1));
  return max_of(int64_t(4), ceil_div(min_of(fair, longest), int64_t(2)) * 2);
}

template <typename scalar_t>
const scalar_t* residual_of(const Conv2dParams& p, int64_t n, int64_t k) {
  if (p.residual == nullptr) return nullptr;
  return static_cast<const scalar_t*>(p.residual) + n * p.residual_stride[0] + k * p.residual_stride[1];
}

// Input and output channels_last.
template <typename scalar_t>
void run_in_place(Call<scalar_t> call, const TapTable& rows, const TapTable& columns) {
  using T = opmath_t<scalar_t>;
  const Conv2dParams& p = call.p;
  const Blocks blocks(p.C, kBlockBytes / (p.R * tile_width(p) * int64_t(sizeof(scalar_t))) + 1, kLanes<T>);
  const int64_t OH = p.whole_rows(), band = band_of(p, blocks.count, p.OW * p.K), bands = ceil_div(OH, band);
  const TapOffsets row_offsets(rows, p.input_stride[2]), column_offsets(columns, p.input_stride[3]);
  call.rows = row_offsets.data();
  call.columns = column_offsets.data();
  call.streams = streams_outputs<scalar_t>(p);
  const int64_t image_bytes = p.C * p.H * p.W * int64_t(sizeof(scalar_t));
  call.prefetches = p.N * image_bytes > kCachedBytes;
  call.by_rows = p.N * image_bytes > kNearBytes && image_bytes > kCachedBytes && p.stride[0] == 1;
  const ConvolveBand<scalar_t> convolve = choose<scalar_t>(p);
  const int64_t tasks = p.N * bands * blocks.count;
  parallel_for(tasks, tasks_together(p, tasks), [&](int64_t begin, int64_t end) {
    Buffer<T> sums;
    Buffer<scalar_t> finished;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (bands * blocks.count), b = task % blocks.count, c = blocks.begin(b);
      Band<scalar_t> part;
      part.input = static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] + c;
      part.output = static_cast<scalar_t*>(p.output) + n * p.output_stride[0] + c * call.M;
      part.output_row = p.output_stride[2];
      part.output_pixel = p.output_stride[3];
      part.residual = residual_of<scalar_t>(p, n, c * call.M);
      part.c = c;
      part.channels = blocks.end(b) - c;
      part.first = task / blocks.count % bands * band;
      part.last = min_of(part.first + band, OH);
      convolve(call, part, sums, finished);
    }
    if (call.streams) end_of_streams();
  });
}

// tile[pixel][channel] = map, converted; all rows at once where they follow each other.
template <typename scalar_t, typename T>
void turn_in(T* tile, int64_t pitch, const scalar_t* map, const int64_t* stride, int64_t channels, int64_t rows,
             int64_t columns) {
  const bool joined = stride[2] == columns * stride[3];
  const int64_t runs = joined ? 1 : rows, pixels = joined ? rows * columns : columns;
  for (int64_t run = 0; run < runs; ++run, map += stride[2], tile += pixels * pitch) {
    if (stride[1] != 1) {
      load_tile(tile, pitch, map, stride[1], stride[3], channels, pixels);
    } else {
      for (int64_t i = 0; i < pixels; ++i)
        for_registers<T>(channels, [&](int64_t c) { store(tile + i * pitch + c, load(map + i * stride[3] + c)); });
    }
  }
}

// The way back.
template <typename scalar_t>
void turn_out(const scalar_t* tile, int64_t pitch, scalar_t* map, const int64_t* stride, int64_t channels, int64_t rows,
              int64_t columns) {
  using T = opmath_t<scalar_t>;
  const bool joined = stride[2] == columns * stride[3];
  const int64_t runs = joined ? 1 : rows, pixels = joined ? rows * columns : columns;
  for (int64_t run = 0; run < runs; ++run, map += stride[2], tile += pixels * pitch) {
    if constexpr (sizeof(scalar_t) == sizeof(T)) {
      store_tile(map, tile, pitch, stride[1], stride[3], channels, pixels);
    } else {
      constexpr int64_t kPart = 64;
      alignas(64) T part[kPart * kPart];
      for (int64_t c = 0; c < channels; c += kPart) {
        for (int64_t i = 0; i < pixels; i += kPart) {
          const int64_t count = min_of(kPart, pixels - i), lanes = min_of(kPart, channels - c);
          load_tile(part, kPart, tile + i * pitch + c, 1, pitch, lanes, count);
          store_tile(map + c * stride[1] + i * stride[3], part, kPart, stride[1], stride[3], lanes, count);
        }
      }
    }
  }
}

// Any layouts and types: a task brings its part of the input into scratch, and its outputs back.
template <typename scalar_t>
void run_turned(Call<scalar_t> call, const TapTable& rows, const TapTable& columns) {
  using T = opmath_t<scalar_t>;
  const Conv2dParams& p = call.p;
  const int64_t OH = p.whole_rows(), M = call.M, OW = p.columns_out();
  const bool reads_runs = p.input_stride[1] == 1, writes_straight = p.output_stride[1] == 1;
  const int64_t wanted = (reads_runs && writes_straight ? 4 : 2) * kLanes<T>;
  const Blocks blocks(p.C, min_of(p.C, wanted), kLanes<T>);
  const int64_t pitch = ceil_div(blocks.largest(), int64_t(kLanes<T>)) * kLanes<T>;
  const int64_t row_bytes = p.W * pitch * int64_t(sizeof(T));
  // Rows that fit, with those above and below; all of them where padding may read any.
  const int64_t halo = (p.R - 1) * p.dilation[0] + 1;
  int64_t band = max_of(int64_t(8), (kTurnedBytes / max_of(row_bytes, int64_t(1)) - halo) / p.stride[0] / 2 * 2);
  band = min_of(band, band_of(p, blocks.count, p.OW * pitch * M));
  if (p.padding_mode != PaddingMode::kZeros) band = OH;
  const int64_t bands = ceil_div(OH, max_of(band, int64_t(1)));
  const TapOffsets row_offsets(rows, p.W * pitch), column_offsets(columns, pitch);
  call.rows = row_offsets.data();
  call.columns = column_offsets.data();
  const ConvolveBand<scalar_t> convolve = choose<scalar_t>(p);
  const int64_t tasks = p.N * bands * blocks.count;
  parallel_for(tasks, tasks_together(p, tasks), [&](int64_t begin, int64_t end) {
    Buffer<T> sums, input;
    Buffer<scalar_t> finished, output;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (bands * blocks.count), b = task % blocks.count, c = blocks.begin(b);
      Band<scalar_t> part;
      part.c = c;
      part.channels = blocks.end(b) - c;
      part.first = task / blocks.count % bands * band;
      part.last = min_of(part.first + band, OH);
      const int64_t top = part.first * p.stride[0] - p.padding_top;
      const int64_t bottom = (part.last - 1) * p.stride[0] - p.padding_top + halo;
      const bool is_banded = p.padding_mode == PaddingMode::kZeros;
      const int64_t first = is_banded ? min_of(max_of(top, int64_t(0)), p.H) : 0;
      const int64_t last = is_banded ? min_of(max_of(bottom, first), p.H) : p.H;
      input.reserve((last - first) * p.W * pitch);
      const scalar_t* const source = static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] +
                                     c * p.input_stride[1] + first * p.input_stride[2];
      turn_in(input.data(), pitch, source, p.input_stride, part.channels, last - first, p.W);
      const int64_t first_row = p.pool ? part.first / 2 : part.first, last_row = p.pool ? part.last / 2 : part.last;
      scalar_t* const image = static_cast<scalar_t*>(p.output) + n * p.output_stride[0] + c * M * p.output_stride[1];
      part.input = input.data() - first * p.W * pitch;
      part.residual = residual_of<scalar_t>(p, n, c * M);
      if (writes_straight) {
        part.output = image;
        part.output_row = p.output_stride[2];
        part.output_pixel = p.output_stride[3];
        convolve(call, part, sums, finished);
        continue;
      }
      output.reserve((last_row - first_row) * OW * pitch * M);
      part.output = output.data() - first_row * OW * pitch * M;
      part.output_row = OW * pitch * M;
      part.output_pixel = pitch * M;
      convolve(call, part, sums, finished);
      turn_out(output.data(), pitch * M, image + first_row * p.output_stride[2], p.output_stride, part.channels * M,
               last_row - first_row, OW);
    }
  });
}

// The distance between two taps of the packed weight.
template <typename T>
int64_t weight_pitch(const Conv2dParams& p) {
  return max_of(p.C, int64_t(kLanes<T>));
}

template <typename scalar_t>
void pack(const Conv2dParams& p, opmath_t<scalar_t>* target) {
  using T = opmath_t<scalar_t>;
  const int64_t M = p.K / p.C, taps = p.R * p.S, pitch = weight_pitch<T>(p);
  const int64_t* stride = p.weight_stride;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t t = 0; t < taps; ++t, target += pitch) {
      const scalar_t* source =
          static_cast<const scalar_t*>(p.weight) + m * stride[0] + t / p.S * stride[2] + t % p.S * stride[3];
      for (int64_t c = 0; c < p.C; ++c) target[c] = to_float(source[c * M * stride[0]]);
      for (int64_t c = p.C; c < pitch; ++c) target[c] = 0;
    }
  }
}

template <typename scalar_t>
void forward_typed(const Conv2dParams& p) {
  using T = opmath_t<scalar_t>;
  const int64_t M = p.K / p.C, pitch = weight_pitch<T>(p);
  const T* weight = static_cast<const T*>(p.packed);
  Buffer<T> packed;
  if (weight == nullptr) {
    packed.reserve(M * p.R * p.S * pitch);
    pack<scalar_t>(p, packed.data());
    weight = packed.data();
  }
  if (p.C < kLanes<T>) return depthwise_planes<scalar_t>(p, weight, pitch);
  const Epilogue<T> epilogue(p.K, p.bias, p.bias_dtype, p.scale, p.shift, p.scale_dtype, p.activation);
  const CheapActivation<T> activation(p.activation);
  const TapTable rows(p, 0, p.stride[0]), columns(p, 1, kColumns * p.stride[1]);
  const Call<scalar_t> call{p, weight, pitch, nullptr, nullptr, epilogue, activation, M, false, false, false};
  if constexpr (sizeof(scalar_t) == sizeof(T)) {
    if (p.input_stride[1] == 1 && p.output_stride[1] == 1) return run_in_place(call, rows, columns);
  }
  run_turned(call, rows, columns);
}

}  // namespace

void forward_depthwise(const Conv2dParams& p) {
  if (p.N == 0 || p.K == 0 || p.OH <= 0 || p.OW <= 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) { forward_typed<decltype(scalar)>(p); });
}

int64_t packed_bytes_depthwise(const Conv2dParams& p) {
  if (p.K == 0) return 0;
  const int64_t taps = p.K / p.C * p.R * p.S;
  if (p.dtype == DType::kFloat64) return taps * weight_pitch<double>(p) * int64_t(sizeof(double));
  return taps * weight_pitch<float>(p) * int64_t(sizeof(float));
}

void pack_depthwise(const PackParams& p) {
  if (p.K == 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    pack<scalar_t>(p, static_cast<opmath_t<scalar_t>*>(p.target));
  });
}

}  // namespace pvk::conv2d::PVK_ISA
