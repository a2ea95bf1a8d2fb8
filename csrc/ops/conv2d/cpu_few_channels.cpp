// Convolution of few input channels on the CPU (the first layer of a model): groups 1, any layouts.
//
// A task owns a band of output rows at some panels of output channels. It copies the input rows, converted, into a
// padded band, in the order of channels and columns that they have; a tile of pixels x a panel of K then goes once
// through all taps, whose places in the band are a table of offsets. Sums are finished a chunk of pixels at a time,
// and turned where the output is not channels_last.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/epilogue.h"
#include "core/math.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/transpose.h"
#include "ops/conv2d/cpu_few_channels_tile.h"
#include "ops/conv2d/cpu_kernels.h"
#include "ops/conv2d/cpu_tap_table.h"

namespace pvk::conv2d::PVK_ISA {
namespace {

constexpr int64_t kChunk = 96;  // pixels that are finished at a time: a multiple of all of those, and of pooling's 4
constexpr int64_t kSpare = 8;   // that a tile may take beyond
constexpr int64_t kBandBytes = 192 << 10;
constexpr int64_t kBandRows = 8;
constexpr int64_t kSmallWork = 1 << 18;  // multiply-adds that waking a thread is not worth

// Registers of output channels dealt out to panels evenly: [first, last) of panel i, in channels.
struct Panels {
  int64_t lanes, vectors, count;

  Panels(int64_t K, int64_t lanes)
      : lanes(lanes), vectors(ceil_div(K, lanes)), count(ceil_div(vectors, int64_t(kVectors))) {}
  int64_t first(int64_t i) const { return vectors * i / count * lanes; }
  int64_t width(int64_t i) const { return first(i + 1) - first(i); }
  int64_t padded() const { return vectors * lanes; }
};

// The input rows of a task: element (row, column, c) is at row * row_pitch + column * column_step + c * channel_step.
struct BandLayout {
  int64_t rows, row_pitch, column_step, channel_step;
};

// A row of the input, padded, to the band.
template <typename scalar_t, typename T>
void copy_row(const Conv2dParams& p, const BandLayout& band, const TapTable& columns, const scalar_t* source,
              T* target) {
  const int64_t needed = columns.needed();
  const int64_t first = max_of(int64_t(0), min_of(p.padding_left, needed));
  const int64_t last = max_of(first, min_of(p.padding_left + p.W, needed));
  const int64_t* const stride = p.input_stride;
  const auto copy_some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < p.C; ++c)
        target[i * band.column_step + c * band.channel_step] =
            columns[i] < 0 ? T(0) : T(to_float(source[columns[i] * stride[3] + c * stride[1]]));
  };
  const auto copy_run = [&](const scalar_t* from, T* to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = to_float(from[i]);
  };
  copy_some(0, first);
  copy_some(last, needed);
  source += (first - p.padding_left) * stride[3];
  if (band.channel_step == 1 && (stride[1] == 1 || p.C == 1) && stride[3] == p.C) {
    copy_run(source, target + first * p.C, (last - first) * p.C);
  } else if (band.column_step == 1 && stride[3] == 1) {
    for (int64_t c = 0; c < p.C; ++c)
      copy_run(source + c * stride[1], target + c * band.channel_step + first, last - first);
  } else {
    copy_some(first, last);
  }
}

template <typename T>
bool all_finite(const T* values, int64_t count) {
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) sum += load(values + i) * T(0);
  T rest = 0;
  for (; i < count; ++i) rest += values[i] * T(0);
  for (int lane = 0; lane < kLanes<T>; ++lane) rest += sum[lane];
  return rest == T(0);
}

template <typename scalar_t>
class FewChannels {
  using T = opmath_t<scalar_t>;

 public:
  FewChannels(const Conv2dParams& p, const T* packed)
      : p_(p),
        packed_(packed),
        panels_(p.K, kLanes<T>),
        rows_(p, 0, 0),
        columns_(p, 1, 0),
        epilogue_(p.K, p.bias, p.bias_dtype, p.scale, p.shift, p.scale_dtype, p.activation),
        activation_(p.activation),
        taps_(p.C * p.R * p.S),
        offsets_(p.C * p.R * p.S) {
    OH_ = p.whole_rows();
    OW_ = p.whole_columns();
    const bool channels_first = p.input_stride[3] < p.input_stride[1];
    layout_.column_step = channels_first ? 1 : p.C;
    layout_.channel_step = channels_first ? columns_.needed() : 1;
    layout_.row_pitch = columns_.needed() * p.C;
    const int64_t row_bytes = layout_.row_pitch * p.stride[0] * int64_t(sizeof(T));
    const int64_t fair = ceil_div(p.N * p.OH, thread_count() * 4);  // several bands to a thread
    const int64_t rows = min_of(min_of(kBandBytes / max_of(row_bytes, int64_t(1)), kBandRows), fair);
    band_ = max_of(int64_t(2), rows / 2 * 2);
    layout_.rows = (band_ - 1) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1;
    for (int64_t t = 0; t < taps_; ++t) {
      const int64_t r = t / (p.S * p.C), s = t / p.C % p.S, c = t % p.C;
      offsets_[t] =
          r * p.dilation[0] * layout_.row_pitch + s * p.dilation[1] * layout_.column_step + c * layout_.channel_step;
    }
    // The band's zeros times a weight that is not finite would be NaN.
    bool has_zeros = false;
    for (int64_t i = 0; i < rows_.needed(); ++i) has_zeros |= rows_[i] < 0;
    for (int64_t i = 0; i < columns_.needed(); ++i) has_zeros |= columns_[i] < 0;
    skips_zeros_ = has_zeros && !all_finite(packed, taps_ * panels_.padded());
  }

  void run() {
    const int64_t bands = ceil_div(OH_, band_);
    const int64_t wanted = ceil_div(thread_count() == 1 ? 1 : thread_count() * 6, max_of(p_.N * bands, int64_t(1)));
    const int64_t groups = max_of(int64_t(1), min_of(wanted, panels_.count));
    const int64_t tasks = p_.N * bands * groups, work = p_.N * p_.OH * p_.OW * p_.K * taps_;
    parallel_for(tasks, work < kSmallWork ? tasks : 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      scratch.band.reserve(layout_.rows * layout_.row_pitch);
      int64_t filled = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t place = task / groups, group = task % groups, n = place / bands;
        const int64_t first = place % bands * band_, last = min_of(first + band_, OH_);
        if (place != filled) fill_band(n, first, last, scratch.band.data());
        filled = place;
        for (int64_t i = panels_.count * group / groups; i < panels_.count * (group + 1) / groups; ++i)
          run_panel(n, first, last, i, scratch);
      }
    });
  }

 private:
  struct Scratch {
    Buffer<T> band, sums, finished, residual;
    const T* pixels[kChunk + kSpare];
    scalar_t* outputs[kChunk + kSpare];
    int64_t places[kChunk];  // oh * OW + ow
  };

  void fill_band(int64_t n, int64_t first, int64_t last, T* band) {
    const int64_t needed = (last - 1 - first) * p_.stride[0] + (p_.R - 1) * p_.dilation[0] + 1;
    for (int64_t i = 0; i < needed; ++i, band += layout_.row_pitch) {
      const int64_t row = rows_[first * p_.stride[0] + i];
      if (row < 0) {
        __builtin_memset(band, 0, size_t(layout_.row_pitch) * sizeof(T));
      } else {
        copy_row(p_, layout_, columns_,
                 static_cast<const scalar_t*>(p_.input) + n * p_.input_stride[0] + row * p_.input_stride[2], band);
      }
    }
  }

  // Pixels in the order of the output; pooled, the four of an output follow each other.
  void run_panel(int64_t n, int64_t first, int64_t last, int64_t panel, Scratch& scratch) {
    const int64_t width = panels_.width(panel), k = panels_.first(panel), channels = min_of(width, p_.K - k);
    const bool is_finished = activation_.is_cheap && p_.residual == nullptr && !skips_zeros_;
    const bool goes_straight = p_.output_stride[1] == 1 && !p_.pool, is_straight = is_finished && goes_straight;
    scratch.sums.reserve((kChunk + kSpare) * width);
    scratch.finished.reserve(kChunk * width);
    Tiles<scalar_t> tiles{};
    tiles.pixels = scratch.pixels;
    tiles.outputs = is_straight ? scratch.outputs : nullptr;
    tiles.sums = scratch.sums.data();
    tiles.offsets = offsets_.data();
    tiles.taps = taps_;
    tiles.panel = packed_ + k * taps_;
    tiles.scale = is_finished ? epilogue_.scale() + k : nullptr;
    tiles.shift = epilogue_.shift() + k;
    tiles.activation = &activation_;
    tiles.last_lanes = channels - (width - kLanes<T>);
    scalar_t* const output = static_cast<scalar_t*>(p_.output) + n * p_.output_stride[0] + k * p_.output_stride[1];
    const int64_t total = (last - first) * OW_;
    int64_t y = 0, x = 0;
    for (int64_t begin = 0; begin < total; begin += kChunk) {
      const int64_t count = min_of(kChunk, total - begin);
      const int64_t first_y = first + y, first_x = x;
      if (p_.pool) {
        for (int64_t i = 0; i < count; ++i) {
          set_pixel(scratch, i, first, y, x);
          advance_pooled(y, x);
        }
      } else {
        for (int64_t i = 0; i < count;) {
          const int64_t run = min_of(count - i, OW_ - x);
          set_run(scratch.pixels + i, pixel_at(scratch, y, x), p_.stride[1] * layout_.column_step, run);
          if (is_straight) {
            scalar_t* const target = output + (first + y) * p_.output_stride[2] + x * p_.output_stride[3];
            set_run(scratch.outputs + i, target, p_.output_stride[3], run);
          }
          if (!is_finished)
            for (int64_t j = 0; j < run; ++j) scratch.places[i + j] = (first + y) * p_.OW + x + j;
          i += run;
          x += run;
          if (x == OW_) x = 0, ++y;
        }
      }
      for (int64_t i = count; i < count + kSpare; ++i) {
        scratch.pixels[i] = scratch.pixels[count - 1];
        scratch.outputs[i] = scratch.outputs[count - 1];
      }
      convolve_chunk_of<scalar_t>(width / kLanes<T>, tiles, count);
      if (is_straight) continue;
      if (skips_zeros_) sum_without_zeros(scratch, count, tiles.panel, width);
      if (is_finished) {
        store_turned(output, first_y, first_x, channels, count, width, scratch.sums.data());
      } else if (goes_straight) {
        finish_straight(n, k, channels, count, width, scratch, output);
      } else {
        finish(n, k, channels, count, width, scratch);
        store_turned(output, first_y, first_x, channels, count, width, scratch.finished.data());
      }
    }
  }

  const T* pixel_at(Scratch& scratch, int64_t y, int64_t x) const {
    return scratch.band.data() + y * p_.stride[0] * layout_.row_pitch + x * p_.stride[1] * layout_.column_step;
  }

  template <typename Pointer>
  PVK_INLINE static void set_run(Pointer* pointers, Pointer first, int64_t step, int64_t count) {
    for (int64_t j = 0; j < count; ++j) pointers[j] = first + j * step;
  }

  void set_pixel(Scratch& scratch, int64_t i, int64_t first, int64_t y, int64_t x) const {
    scratch.pixels[i] = pixel_at(scratch, y, x);
    scratch.places[i] = (first + y) * p_.OW + x;
    scratch.outputs[i] = nullptr;
  }

  PVK_INLINE void advance_pooled(int64_t& y, int64_t& x) const {
    if (x % 2 == 0) {
      ++x;
    } else if (y % 2 == 0) {
      --x, ++y;
    } else {
      --y;
      if (++x == OW_) x = 0, y += 2;
    }
  }

  // Once more, only taps inside of the input.
  void sum_without_zeros(Scratch& scratch, int64_t count, const T* weight, int64_t width) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t oh = scratch.places[i] / p_.OW, ow = scratch.places[i] % p_.OW;
      T* const sums = scratch.sums.data() + i * width;
      for (int64_t v = 0; v < width; ++v) sums[v] = 0;
      for (int64_t t = 0; t < taps_; ++t) {
        const int64_t row = rows_[oh * p_.stride[0] + t / (p_.S * p_.C) * p_.dilation[0]];
        const int64_t column = columns_[ow * p_.stride[1] + t / p_.C % p_.S * p_.dilation[1]];
        if (row < 0 || column < 0) continue;
        const T value = scratch.pixels[i][offsets_[t]];
        for (int64_t v = 0; v < width; ++v) sums[v] += value * weight[t * width + v];
      }
    }
  }

  // Calls body(first, count, oh, ow) for the runs of pixels that lie in one output row.
  template <typename Body>
  PVK_INLINE void for_runs(const Scratch& scratch, int64_t count, const Body& body) {
    for (int64_t i = 0; i < count;) {
      const int64_t oh = scratch.places[i] / p_.OW, ow = scratch.places[i] % p_.OW;
      const int64_t run = p_.pool ? 1 : min_of(count - i, OW_ - ow);
      body(i, run, oh, ow);
      i += run;
    }
  }

  // To an output with stride 1 along the channels.
  void finish_straight(int64_t n, int64_t k, int64_t channels, int64_t count, int64_t width, Scratch& scratch,
                       scalar_t* output) {
    FinishRows<scalar_t> rows{};
    rows.sums_pitch = width;
    rows.output_pitch = p_.output_stride[3];
    rows.residual_pitch = p_.residual_stride[3];
    rows.residual_channel_stride = p_.residual_stride[1];
    rows.first = k;
    rows.channels = channels;
    for_runs(scratch, count, [&](int64_t i, int64_t run, int64_t oh, int64_t ow) {
      rows.sums = scratch.sums.data() + i * width;
      rows.output = output + oh * p_.output_stride[2] + ow * p_.output_stride[3];
      if (p_.residual != nullptr) rows.residual = residual_at(n, k, oh, ow);
      rows.rows = run;
      finish_rows(epilogue_, rows);
    });
  }

  const scalar_t* residual_at(int64_t n, int64_t k, int64_t oh, int64_t ow) const {
    const int64_t* const stride = p_.residual_stride;
    return static_cast<const scalar_t*>(p_.residual) + n * stride[0] + k * stride[1] + oh * stride[2] + ow * stride[3];
  }

  void finish(int64_t n, int64_t k, int64_t channels, int64_t count, int64_t width, Scratch& scratch) {
    FinishRows<T> rows{};
    if (p_.residual != nullptr) {
      scratch.residual.reserve(kChunk * width);
      for_runs(scratch, count, [&](int64_t i, int64_t run, int64_t oh, int64_t ow) {
        load_tile(scratch.residual.data() + i * width, width, residual_at(n, k, oh, ow), p_.residual_stride[1],
                  p_.residual_stride[3], channels, run);
      });
      rows.residual = scratch.residual.data();
      rows.residual_pitch = width;
      rows.residual_channel_stride = 1;
    }
    rows.sums = scratch.sums.data();
    rows.sums_pitch = width;
    rows.output = scratch.finished.data();
    rows.output_pitch = width;
    rows.rows = count;
    rows.first = k;
    rows.channels = width;
    finish_rows(epilogue_, rows);
  }

  // Values [count][width] of the pixels from (oh, ow) on, pooled first, to the output.
  void store_turned(scalar_t* output, int64_t oh, int64_t ow, int64_t channels, int64_t count, int64_t width,
                    T* values) {
    const int64_t pooled = p_.pool ? 2 : 1, row_of = OW_ / pooled;
    const int64_t outputs = count / (pooled * pooled);
    if (p_.pool) pool_pixels(values, outputs, width);
    // Whole rows of the output may follow each other: then a chunk is one run.
    const bool joined = p_.output_stride[2] == row_of * p_.output_stride[3];
    int64_t row = oh / pooled, column = ow / pooled;
    for (int64_t i = 0; i < outputs;) {
      const int64_t run = joined ? outputs : min_of(outputs - i, row_of - column);
      store_tile(output + row * p_.output_stride[2] + column * p_.output_stride[3], values + i * width, width,
                 p_.output_stride[1], p_.output_stride[3], channels, run);
      i += run;
      column = 0;
      ++row;
    }
  }

  // Four rows to their maximum, in place.
  void pool_pixels(T* rows, int64_t outputs, int64_t width) {
    for (int64_t i = 0; i < outputs; ++i) {
      for (int64_t v = 0; v < width; v += kLanes<T>) {
        const T* const x = rows + 4 * i * width + v;
        store(rows + i * width + v, pool_window(x, x + 2 * width, width));
      }
    }
  }

  const Conv2dParams& p_;
  const T* const packed_;  // [panel][taps][width of the panel]
  const Panels panels_;
  const TapTable rows_, columns_;
  const Epilogue<T> epilogue_;
  const CheapActivation<T> activation_;
  const int64_t taps_;  // (r, s, c)
  Buffer<int64_t> offsets_;
  BandLayout layout_;
  int64_t OH_, OW_, band_;
  bool skips_zeros_;
};

template <typename scalar_t>
void pack(const Conv2dParams& p, opmath_t<scalar_t>* target) {
  using T = opmath_t<scalar_t>;
  const Panels panels(p.K, kLanes<T>);
  const int64_t* const stride = p.weight_stride;
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t k = panels.first(i), width = panels.width(i), channels = min_of(width, p.K - k);
    for (int64_t t = 0; t < p.R * p.S * p.C; ++t, target += width) {
      const scalar_t* const source = static_cast<const scalar_t*>(p.weight) + k * stride[0] + t % p.C * stride[1] +
                                     t / (p.S * p.C) * stride[2] + t / p.C % p.S * stride[3];
      for (int64_t v = 0; v < channels; ++v) target[v] = to_float(source[v * stride[0]]);
      for (int64_t v = channels; v < width; ++v) target[v] = 0;
    }
  }
}

}  // namespace

void forward_few_channels(const Conv2dParams& p) {
  if (p.N == 0 || p.K == 0 || p.OH <= 0 || p.OW <= 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using T = opmath_t<scalar_t>;
    const T* weight = static_cast<const T*>(p.packed);
    Buffer<T> packed;
    if (weight == nullptr) {
      packed.reserve(packed_bytes_few_channels(p) / int64_t(sizeof(T)));
      pack<scalar_t>(p, packed.data());
      weight = packed.data();
    }
    FewChannels<scalar_t>(p, weight).run();
  });
}

int64_t packed_bytes_few_channels(const Conv2dParams& p) {
  const int64_t taps = p.C * p.R * p.S;
  if (p.dtype == DType::kFloat64) return taps * Panels(p.K, kLanes<double>).padded() * int64_t(sizeof(double));
  return taps * Panels(p.K, kLanes<float>).padded() * int64_t(sizeof(float));
}

void pack_few_channels(const PackParams& p) {
  if (p.K == 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    pack<scalar_t>(p, static_cast<opmath_t<scalar_t>*>(p.target));
  });
}

}  // namespace pvk::conv2d::PVK_ISA
