// Batch normalisation on the CPU, forward; cpu_backward.cpp is the backward.
//
// Planes: a channel is one thread's, from its sums to its result, which finds in the cache what the sums read last.
// Rows: parts of the pixels make sums, which are merged in order; then pixels are finished, the last ones first. The
// borders of parts and pieces depend on sizes alone, so that the number of threads changes no bit.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/epilogue.h"
#include "core/isa.h"
#include "core/moments.h"
#include "core/simd.h"
#include "core/stream.h"
#include "ops/batch_norm/cpu_pieces.h"

namespace pvk::batch_norm {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

// Count, mean and sum of squared differences, in double.
struct Merged {
  double count = 0, mean = 0, square = 0;

  PVK_INLINE void add(double n, double other_mean, double other_square) {
    const double total = count + n, delta = other_mean - mean;
    mean += count == 0 ? other_mean - mean : delta * (n / total);
    square += other_square + (count == 0 ? 0 : delta * delta * (count * n / total));
    count = total;
  }
};

template <typename T>
PVK_INLINE T reciprocal_root(T x) {
  if constexpr (sizeof(T) == 8) return T(1) / __builtin_sqrt(x);
  return T(1) / __builtin_sqrtf(x);
}

template <typename T>
PVK_INLINE void write_stats(const BatchNormParams& p, int64_t c, const Merged& all) {
  T* const stats = static_cast<T*>(p.stats);
  stats[c] = T(all.mean);
  stats[p.C + c] = T(1.0 / __builtin_sqrt(all.square / all.count + p.eps));
  stats[2 * p.C + c] = T(all.square / (all.count - 1));
}

// (x - center) * scale + shift of a channel.
template <typename T>
struct Affine {
  T center, scale, shift;

  Affine(const BatchNormParams& p, int64_t c) {
    const T* const stats = static_cast<const T*>(p.stats);
    center = stats[c];
    scale = stats[p.C + c] * element(p.weight, p.weight_dtype, c, T(1));
    shift = element(p.bias, p.weight_dtype, c, T(0));
  }
};

template <typename T>
void running_stats(const BatchNormParams& p) {
  T* const stats = static_cast<T*>(p.stats);
  for (int64_t c = 0; c < p.C; ++c) {
    const T variance = element(p.running_var, p.running_dtype, c, T(0));
    stats[c] = element(p.running_mean, p.running_dtype, c, T(0));
    stats[p.C + c] = reciprocal_root(variance + T(p.eps));
    stats[2 * p.C + c] = variance;
  }
}

// ---- forward of planes ----

template <Activation kActivation, typename scalar_t, typename T>
void finish_plane(const BatchNormParams& p, int64_t offset, const Affine<T>& affine, bool past) {
  const scalar_t* const x = static_cast<const scalar_t*>(p.input) + offset;
  scalar_t* const output = static_cast<scalar_t*>(p.output) + offset;
  const Vec<T> scale = splat(affine.scale), shift = splat(affine.shift);
  const auto value = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    return fma(load_lanes(x + i, lanes) - affine.center, scale, shift);
  };
  if (p.residual != nullptr) {
    const scalar_t* const residual = static_cast<const scalar_t*>(p.residual) + offset;
    for_row<T>(p.S, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      store_lanes(output + i, activate<kActivation, T>(value(i, lanes) + load_lanes(residual + i, lanes)), lanes);
    });
  } else if (past) {
    for_row<T>(p.S, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      stream(output + i, activate<kActivation, T>(value(i, lanes)));
    });
  } else {
    for_row<T>(p.S, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      store_lanes(output + i, activate<kActivation, T>(value(i, lanes)), lanes);
    });
  }
}

template <typename scalar_t>
void forward_planes(const BatchNormParams& p) {
  using T = opmath_t<scalar_t>;
  if (!p.training) running_stats<T>(p);
  const bool past = streams(static_cast<scalar_t*>(p.output), p.S, p.N * p.C * p.S * int64_t(sizeof(scalar_t)));
  parallel_for(p.C, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (p.training) {
        Merged all;
        for (int64_t n = 0; n < p.N; ++n) {
          const scalar_t* const plane = static_cast<const scalar_t*>(p.input) + (n * p.C + c) * p.S;
          for (int64_t i = 0; i < p.S; i += kElementsOfPiece) {
            const int64_t count = min_of(kElementsOfPiece, p.S - i);
            const Moments<T> moments = moments_of_row(plane + i, count);
            all.add(double(count), moments.exact_mean, double(moments.square));
          }
        }
        write_stats<T>(p, c, all);
      }
      const Affine<T> affine(p, c);
      with_activation(p.activation, [&](auto tag) __attribute__((always_inline)) {
        constexpr Activation kActivation = decltype(tag)::value;
        for (int64_t n = p.N; n-- > 0;) finish_plane<kActivation, scalar_t>(p, (n * p.C + c) * p.S, affine, past);
      });
    }
    if (past) end_of_streams();
  });
}

// ---- forward of rows ----

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// mean and square, [C], get those of `rows` more pixels beside the `before` that they are of; the mean is that of the
// differences to `base`, the first of all, so that a large one costs no digits.
template <typename scalar_t, typename T>
void merge_rows(const scalar_t* x, const scalar_t* base, int64_t rows, int64_t C, int64_t before, T* mean, T* square,
                T* sums) {
  T *const center = sums, *const squares = sums + C;
  const T share = T(1) / T(rows), part = T(rows) / T(before + rows), weight = T(before) * part;
  for_row<T>(
      C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) { store_lanes(center + c, Vec<T>{}, lanes); });
  for (int64_t r = 0; r < rows; r += kRows) {  // the mean of differences to the first row
    const int64_t count = min_of(int64_t(kRows), rows - r);
    for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
      const Vec<T> first = load_lanes(x + c, lanes);
      Vec<T> sum = load_lanes(center + c, lanes);
      for (int64_t k = 0; k < count; ++k) sum = fma(load_lanes(x + (r + k) * C + c, lanes) - first, splat(share), sum);
      store_lanes(center + c, sum, lanes);
    });
  }
  T* const missed = sums + 2 * C;
  for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
    store_lanes(center + c, load_lanes(center + c, lanes) + load_lanes(x + c, lanes), lanes);
    store_lanes(squares + c, Vec<T>{}, lanes);
    store_lanes(missed + c, Vec<T>{}, lanes);
  });
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t count = min_of(int64_t(kRows), rows - r);
    for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
      const Vec<T> middle = load_lanes(center + c, lanes);
      Vec<T> sum = load_lanes(missed + c, lanes), product = load_lanes(squares + c, lanes);
      for (int64_t k = 0; k < count; ++k) {
        const Vec<T> difference = load_lanes(x + (r + k) * C + c, lanes) - middle;
        sum += difference;
        product = fma(difference, difference, product);
      }
      store_lanes(missed + c, sum, lanes);
      store_lanes(squares + c, product, lanes);
    });
  }
  for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
    const Vec<T> sum = load_lanes(missed + c, lanes);
    const Vec<T> own = at_least(load_lanes(squares + c, lanes) - sum * (sum * share), T(0));
    const Vec<T> here = (load_lanes(center + c, lanes) - load_lanes(base + c, lanes)) + sum * share;
    if (before == 0) {
      store_lanes(mean + c, here, lanes);
      store_lanes(square + c, own, lanes);
      return;
    }
    const Vec<T> old = load_lanes(mean + c, lanes), delta = here - old;
    store_lanes(mean + c, fma(delta, splat(part), old), lanes);
    store_lanes(square + c, load_lanes(square + c, lanes) + fma(delta * delta, splat(weight), own), lanes);
  });
}

// Rows rows, whose channels' constants are loaded once.
template <int Rows, Activation kActivation, bool kResidual, bool kPast, typename scalar_t, typename T>
PVK_INLINE void finish_some_rows(const BatchNormParams& p, int64_t row, const T* affine) {
  const T *const center = affine, *const scale = affine + p.C, *const shift = affine + 2 * p.C;
  const scalar_t* const x = static_cast<const scalar_t*>(p.input) + row * p.C;
  const scalar_t* const residual = static_cast<const scalar_t*>(p.residual) + row * p.C;
  scalar_t* const output = static_cast<scalar_t*>(p.output) + row * p.C;
  for_row<T>(p.C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
    const Vec<T> middle = load_lanes(center + c, lanes), factor = load_lanes(scale + c, lanes);
    const Vec<T> term = load_lanes(shift + c, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      Vec<T> value = fma(load_lanes(x + r * p.C + c, lanes) - middle, factor, term);
      if constexpr (kResidual) value += load_lanes(residual + r * p.C + c, lanes);
      value = activate<kActivation, T>(value);
      if constexpr (kPast) {
        stream(output + r * p.C + c, value);
      } else {
        store_lanes(output + r * p.C + c, value, lanes);
      }
    }
  });
}

template <Activation kActivation, typename scalar_t, typename T>
void finish_rows_of_map(const BatchNormParams& p, int64_t first, int64_t pixels, const T* affine, bool past) {
  const auto all = [&](auto residual, auto streamed) __attribute__((always_inline)) {
    constexpr bool kResidual = decltype(residual)::value, kPast = decltype(streamed)::value;
    int64_t row = first;
    for (; row + kRows <= first + pixels; row += kRows)
      finish_some_rows<kRows, kActivation, kResidual, kPast, scalar_t>(p, row, affine);
    for (; row < first + pixels; ++row) finish_some_rows<1, kActivation, kResidual, kPast, scalar_t>(p, row, affine);
  };
  if (p.residual != nullptr) return all(Flag<true>{}, Flag<false>{});
  if (past) return all(Flag<false>{}, Flag<true>{});
  all(Flag<false>{}, Flag<false>{});
}

template <typename scalar_t>
void stats_of_rows(const BatchNormParams& p) {
  using T = opmath_t<scalar_t>;
  const int64_t pixels = p.N * p.S, C = p.C, parts = parts_of(pixels, C);
  const int64_t piece = rows_of_piece(C);
  T* const partials = static_cast<T*>(p.partials);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> sums(3 * C);
    for (int64_t part = begin; part < end; ++part) {
      T* const mean = partials + part * 2 * C;
      const int64_t first = pixels * part / parts, last = pixels * (part + 1) / parts;
      const scalar_t* const base = static_cast<const scalar_t*>(p.input) + first * C;
      for (int64_t row = first; row < last; row += piece)
        merge_rows(base + (row - first) * C, base, min_of(piece, last - row), C, row - first, mean, mean + C,
                   sums.data());
    }
  });
  parallel_for(C, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Merged all;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = pixels * part / parts, count = pixels * (part + 1) / parts - first;
        const double base = double(to_float(static_cast<const scalar_t*>(p.input)[first * C + c]));
        all.add(double(count), base + double(partials[part * 2 * C + c]), double(partials[(part * 2 + 1) * C + c]));
      }
      write_stats<T>(p, c, all);
    }
  });
}

template <typename scalar_t>
void forward_rows(const BatchNormParams& p) {
  using T = opmath_t<scalar_t>;
  if (p.training) {
    stats_of_rows<scalar_t>(p);
  } else {
    running_stats<T>(p);
  }
  Buffer<T> affine(3 * p.C);
  for (int64_t c = 0; c < p.C; ++c) {
    const Affine<T> one(p, c);
    affine[c] = one.center;
    affine[p.C + c] = one.scale;
    affine[2 * p.C + c] = one.shift;
  }
  const int64_t pixels = p.N * p.S;
  const bool past = streams(static_cast<scalar_t*>(p.output), p.C, pixels * p.C * int64_t(sizeof(scalar_t)));
  for_pieces_backwards(pixels, p.C, [&](int64_t first, int64_t count) {
    with_activation(p.activation, [&](auto tag) __attribute__((always_inline)) {
      finish_rows_of_map<decltype(tag)::value, scalar_t>(p, first, count, affine.data(), past);
    });
    if (past) end_of_streams();
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

}  // namespace pvk::batch_norm
