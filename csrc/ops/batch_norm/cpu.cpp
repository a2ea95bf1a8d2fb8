// Batch normalisation on the CPU, forward; cpu_backward.cpp is the backward.
//
// Planes: a block of channels is one thread's, from its sums to its result, while it is in the cache. Rows: parts of
// the rows make sums, which are added in order; then rows are finished, the last ones first. Sums are those of squared
// differences to a value of the channel's own range, and of elements (of float64, and of rows of float32, of
// differences); a few in T and these in double. A channel for which that range was a poor guess is summed again
// (docs/ops/batch_norm.md).
#include "core/epilogue.h"
#include "core/isa.h"
#include "ops/batch_norm/cpu_pieces.h"

namespace pvk::batch_norm {
namespace PVK_ISA {
namespace {

// ---- statistics ----

// A channel of `values`, from the sums of differences to its center and of their squares. False where the squares are
// mostly those of a bad center, or left the range of T.
template <typename T>
PVK_INLINE bool write_stats(const BatchNormParams& p, int64_t c, double center, double sum, double square) {
  constexpr double kLeast = sizeof(T) == 8 ? 1e-280 : 1e-30, kMost = 1.7e308;
  const double values = double(p.N * p.S), delta = sum / values;
  const double apart = delta * sum, rest = square - apart > 0 ? square - apart : 0;
  T* const stats = static_cast<T*>(p.stats);
  stats[c] = T(center + delta);
  stats[p.C + c] = T(1.0 / __builtin_sqrt(rest / values + p.eps));
  stats[2 * p.C + c] = T(rest / (values - 1));
  const bool constant = (sum == 0) & (square == 0);
  return constant | ((square >= kLeast * values) & (square <= kMost) & (apart <= 4 * rest));
}

// All of it in double, twice over the channel.
template <typename scalar_t>
void write_exact_stats(const BatchNormParams& p, int64_t c) {
  using T = opmath_t<scalar_t>;
  const int64_t step = p.rows ? p.C : 1, image = p.C * p.S;
  const scalar_t* const x = static_cast<const scalar_t*>(p.input) + (p.rows ? c : c * p.S);
  const double values = double(p.N * p.S);
  double sum = 0, square = 0, rest = 0;
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t i = 0; i < p.S; ++i) sum += double(to_float(x[n * image + i * step]));
  const double mean = sum / values;
  for (int64_t n = 0; n < p.N; ++n) {
    for (int64_t i = 0; i < p.S; ++i) {
      const double difference = double(to_float(x[n * image + i * step])) - mean;
      rest += difference;
      square += difference * difference;
    }
  }
  write_stats<T>(p, c, mean, rest, square);
}

// Factors of channels: (x - center) * scale + shift.
template <typename T>
class Affine {
 public:
  explicit Affine(const BatchNormParams& p) : C_(p.C), data_(3 * p.C) {
    fill(scale(), p.weight, p.weight_dtype, C_, T(1));
    fill(shift(), p.bias, p.weight_dtype, C_, T(0));
  }
  // Takes the statistics of some channels.
  void take(const T* stats, int64_t first, int64_t count) {
    for (int64_t c = first; c < first + count; ++c) {
      center()[c] = stats[c];
      scale()[c] *= stats[C_ + c];
    }
  }
  T* center() { return data_.data(); }
  T* scale() { return data_.data() + C_; }
  T* shift() { return data_.data() + 2 * C_; }

 private:
  const int64_t C_;
  Buffer<T> data_;
};

template <typename T>
void running_stats(const BatchNormParams& p) {
  T *const mean = static_cast<T*>(p.stats), *const rstd = mean + p.C, *const variance = rstd + p.C;
  const T eps = T(p.eps);
  fill(mean, p.running_mean, p.running_dtype, p.C, T(0));
  fill(variance, p.running_var, p.running_dtype, p.C, T(0));
  for (int64_t c = 0; c < p.C; ++c) {
    if constexpr (sizeof(T) == 8) {
      rstd[c] = T(1) / __builtin_sqrt(variance[c] + eps);
    } else {
      rstd[c] = T(1) / __builtin_sqrtf(variance[c] + eps);
    }
  }
}

// ---- results ----

// The activations that are no clamping, a call for each pair.
template <typename T>
__attribute__((noinline)) void activate_rarely(Pair<T>& pair, Activation activation) {
  with_activation(activation, [&](auto tag) __attribute__((always_inline)) {
    pair.first = activate<decltype(tag)::value, T>(pair.first);
    pair.second = activate<decltype(tag)::value, T>(pair.second);
  });
}

// Writes results of neighbours.
enum class Ending { kNone, kClamp, kRare };  // of the activation

template <bool kResidual, Ending kEnding, typename scalar_t>
struct Finish {
  using T = opmath_t<scalar_t>;
  const scalar_t *input, *residual;
  scalar_t* output;
  const Activation activation;
  T high;

  explicit Finish(const BatchNormParams& p)
      : input(static_cast<const scalar_t*>(p.input)),
        residual(static_cast<const scalar_t*>(p.residual)),
        output(static_cast<scalar_t*>(p.output)),
        activation(p.activation),
        high(activation == Activation::kRelu6 ? T(6) : T(__builtin_inf())) {}

  PVK_INLINE void write(int64_t i, int64_t n, bool past, const Pair<T>& center, const Pair<T>& scale,
                        const Pair<T>& shift) const {
    prefetch_ahead(input + i);
    if constexpr (kResidual) prefetch_ahead(residual + i);
    Pair<T> value = fma(load_elements(input + i, n) - center, scale, shift);
    if constexpr (kResidual) value = value + load_elements(residual + i, n);
    if constexpr (kEnding == Ending::kRare) activate_rarely(value, activation);
    if constexpr (kEnding == Ending::kClamp)
      value = {at_most(at_least(value.first, T(0)), high), at_most(at_least(value.second, T(0)), high)};
    if (past) return stream_elements(output + i, value);
    store_elements(output + i, value, n);
  }

  void plane(int64_t offset, int64_t count, bool past, T center, T scale, T shift) const {
    const Pair<T> middle(center), factor(scale), term(shift);
    for_pairs_of_target<scalar_t>(output + offset, count, past,
                                  [&](int64_t i, int64_t n, bool streamed) __attribute__((always_inline)) {
                                    write(offset + i, n, streamed, middle, factor, term);
                                  });
  }

  // affine: [3, pitch].
  void row(int64_t offset, int64_t count, bool past, const T* affine, int64_t pitch) const {
    const auto of = [&](int64_t i) __attribute__((always_inline)) {
      return Pair<T>{load(affine + i), load(affine + i + kLanes<T>)};
    };
    for_pairs<scalar_t>(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      write(offset + i, n, past && n == kPair<scalar_t>, of(i), of(pitch + i), of(2 * pitch + i));
    });
  }
};

// body(Finish<...>) of the kind that is asked for.
template <typename scalar_t, typename Body>
void with_finish(const BatchNormParams& p, const Body& body) {
  const auto with = [&](auto residual) {
    constexpr bool kResidual = decltype(residual)::value;
    if (p.activation == Activation::kNone) return body(Finish<kResidual, Ending::kNone, scalar_t>(p));
    if (p.activation <= Activation::kRelu6) return body(Finish<kResidual, Ending::kClamp, scalar_t>(p));
    body(Finish<kResidual, Ending::kRare, scalar_t>(p));
  };
  if (p.residual != nullptr) return with(Flag<true>{});
  with(Flag<false>{});
}

// ---- planes ----

// Some value of the channel's range: the mean of its first elements, or the value of a constant.
template <typename scalar_t>
PVK_INLINE opmath_t<scalar_t> center_of_plane(const scalar_t* plane, int64_t count) {
  using T = opmath_t<scalar_t>;
  const int64_t n = min_of(count, int64_t(kPair<scalar_t>));
  const T first = to_float(plane[0]);
  const Pair<T> all = n == kPair<scalar_t> ? load_elements(plane, kPair<scalar_t>) : load_elements(plane, n);
  const Pair<T> apart = keep_first<scalar_t>(all - Pair<T>(first), n);
  return first + sum_of_lanes<T>(apart.first + apart.second) / T(n);
}

// The sums of a channel's planes, in double. Elements of float32 go there one by one, for sums of a few would round,
// and differences to a center; of 16 bits such sums hardly do.
template <typename scalar_t>
struct PlaneSums {
  using T = opmath_t<scalar_t>;
  static constexpr bool kSumsElements = sizeof(T) < 8, kAtOnce = sizeof(scalar_t) == 4;
  WideSum<T> sum, square;

  PVK_INLINE void add(const scalar_t* plane, int64_t count, T center) {
    constexpr int64_t kPiece = kPairsOfSum * kPair<scalar_t>;
    const Pair<T> middle(center);
    WideSum<T> all = sum;
    for (int64_t first = 0; first < count; first += kPiece) {
      const scalar_t* const x = plane + first;
      Pair<T> few, squares;
      for_pairs<scalar_t>(min_of(kPiece, count - first), [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Pair<T> elements = load_elements(x + i, n), apart = keep_first<scalar_t>(elements - middle, n);
        if constexpr (kAtOnce) {
          all.add(elements.first);
          all.add(elements.second);
        } else {
          few = few + (kSumsElements ? elements : apart);
        }
        squares = fma(apart, apart, squares);
      });
      if constexpr (!kAtOnce) all.add(few.first + few.second);
      square.add(squares.first + squares.second);
    }
    sum = all;
  }
  bool write(const BatchNormParams& p, int64_t c, T center) const {
    const double from = double(center), apart = sum.value() - (kSumsElements ? double(p.N * p.S) * from : 0);
    return write_stats<T>(p, c, from, apart, square.value());
  }
};

template <typename scalar_t>
void stats_of_planes(const BatchNormParams& p, int64_t first, int64_t channels) {
  using T = opmath_t<scalar_t>;
  const scalar_t* const x = static_cast<const scalar_t*>(p.input);
  T center[kChannelsOfBlock];
  PlaneSums<scalar_t> sums[kChannelsOfBlock];
  for (int64_t k = 0; k < channels; ++k) center[k] = center_of_plane(x + (first + k) * p.S, p.S);
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t k = 0; k < channels; ++k) sums[k].add(x + (n * p.C + first + k) * p.S, p.S, center[k]);
  for (int64_t k = 0; k < channels; ++k) {
    const int64_t c = first + k;
    if (sums[k].write(p, c, center[k])) continue;
    const T again = static_cast<const T*>(p.stats)[c];
    PlaneSums<scalar_t> better;
    for (int64_t n = 0; n < p.N; ++n) better.add(x + (n * p.C + c) * p.S, p.S, again);
    if (!better.write(p, c, again)) write_exact_stats<scalar_t>(p, c);
  }
}

template <typename scalar_t>
void forward_planes(const BatchNormParams& p) {
  using T = opmath_t<scalar_t>;
  const bool past = goes_past_caches(p.N * p.C * p.S * int64_t(sizeof(scalar_t)));
  Affine<T> affine(p);
  const T *const center = affine.center(), *const scale = affine.scale(), *const shift = affine.shift();
  with_finish<scalar_t>(p, [&](const auto& finish) {
    if (!p.training) {
      running_stats<T>(p);
      affine.take(static_cast<const T*>(p.stats), 0, p.C);
      parallel_for(p.N * p.C, max_of(kElementsOfRows / p.S, int64_t(1)), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin, c = begin % p.C; plane < end; ++plane, c = c + 1 < p.C ? c + 1 : 0)
          finish.plane(plane * p.S, p.S, past, center[c], scale[c], shift[c]);
        if (past) end_of_streams();
      });
      return;
    }
    for_blocks_of_channels(p.C, p.N * p.S * int64_t(sizeof(scalar_t)), [&](int64_t first, int64_t channels) {
      stats_of_planes<scalar_t>(p, first, channels);
      affine.take(static_cast<const T*>(p.stats), first, channels);
      for (int64_t n = p.N; n-- > 0;)
        for (int64_t c = first; c < first + channels; ++c)
          finish.plane((n * p.C + c) * p.S, p.S, past, center[c], scale[c], shift[c]);
      if (past) end_of_streams();
    });
  });
}

// ---- rows ----

constexpr int64_t kSamples = 16;

// Some value of each channel's range: the mean of a few pixels all over the map, or the value of a constant.
template <typename scalar_t>
void centers_of_rows(const BatchNormParams& p, opmath_t<scalar_t>* center) {
  using T = opmath_t<scalar_t>;
  const scalar_t* const x = static_cast<const scalar_t*>(p.input);
  const int64_t pixels = p.N * p.S, samples = min_of(pixels, kSamples);
  for (int64_t c = 0; c < p.C; ++c) center[c] = 0;
  for (int64_t k = 1; k < samples; ++k) {
    const scalar_t* const pixel = x + pixels * k / samples * p.C;
    for (int64_t c = 0; c < p.C; ++c) center[c] += to_float(pixel[c]) - to_float(x[c]);
  }
  for (int64_t c = 0; c < p.C; ++c) center[c] = to_float(x[c]) + center[c] * (T(1) / T(samples));
}

template <typename scalar_t>
void stats_of_rows(const BatchNormParams& p, const Rows& rows) {
  using T = opmath_t<scalar_t>;
  const scalar_t* const x = static_cast<const scalar_t*>(p.input);
  constexpr bool kSumsElements = sizeof(scalar_t) == 2;
  Buffer<T> centers(p.C + rows.pitch);
  T *const center = centers.data(), *const in_pairs = center + p.C;
  centers_of_rows<scalar_t>(p, center);
  spread<scalar_t>(rows, center, in_pairs);
  Buffer<double> sums(2 * p.C);
  sums_of_rows<scalar_t>(rows, sums.data(),
                         [&](int64_t offset, int64_t count, int64_t place, int64_t n, Pair<T>& sum, Pair<T>& square)
                             __attribute__((always_inline)) {
                               const Pair<T> middle(load(in_pairs + place), load(in_pairs + place + kLanes<T>));
                               prefetch_rows(rows, x, offset, place);
                               for (int64_t r = 0; r < count; ++r) {
                                 const Pair<T> elements = load_elements(x + offset + r * rows.width, n);
                                 const Pair<T> apart = keep_first<scalar_t>(elements - middle, n);
                                 sum = sum + (kSumsElements ? elements : apart);
                                 square = fma(apart, apart, square);
                               }
                             });
  const auto write = [&](int64_t c) {
    const double from = double(center[c]), apart = sums[c] - (kSumsElements ? double(p.N * p.S) * from : 0);
    return write_stats<T>(p, c, from, apart, sums[p.C + c]);
  };
  int64_t bad = 0;
  for (int64_t c = 0; c < p.C; ++c) bad += !write(c);
  if (bad == 0) return;
  parallel_for(p.C, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      if (!write(c)) write_exact_stats<scalar_t>(p, c);
  });
}

template <typename scalar_t>
void forward_rows(const BatchNormParams& p) {
  using T = opmath_t<scalar_t>;
  const Rows rows = rows_of<scalar_t>(p.N * p.S, p.C);
  if (p.training) {
    stats_of_rows<scalar_t>(p, rows);
  } else {
    running_stats<T>(p);
  }
  Affine<T> affine(p);
  affine.take(static_cast<const T*>(p.stats), 0, p.C);
  Buffer<T> in_pairs(3 * rows.pitch);
  spread<scalar_t>(rows, affine.center(), in_pairs.data());
  spread<scalar_t>(rows, affine.scale(), in_pairs.data() + rows.pitch);
  spread<scalar_t>(rows, affine.shift(), in_pairs.data() + 2 * rows.pitch);
  const bool past = rows.width == rows.pitch && reinterpret_cast<uintptr_t>(p.output) % 64 == 0 &&
                    goes_past_caches(rows.elements() * int64_t(sizeof(scalar_t)));
  with_finish<scalar_t>(p, [&](const auto& finish) {
    for_rows(rows, p.training, past,
             [&](int64_t offset, int64_t count) { finish.row(offset, count, past, in_pairs.data(), rows.pitch); });
  });
}

}  // namespace

void forward(const BatchNormParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    return p.rows || p.S == 1 ? forward_rows<scalar_t>(p) : forward_planes<scalar_t>(p);
  });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, BatchNormParams)

#if defined(PVK_ISA_BASELINE)
int64_t partials_of(int64_t, int64_t) {
  return 0;
}
#endif

}  // namespace pvk::batch_norm
