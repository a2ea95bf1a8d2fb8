// Group normalisation on the CPU, forward; cpu_backward.cpp is the backward.
//
// Planes: a group of a sample is a run of neighbours, cut into parts whose moments are merged in order; then its
// channels are finished, the last one first, while they are in the cache. Rows: parts of the pixels of a sample make
// moments of every channel, which are merged into those of groups; then pixels are finished, the last ones first. The
// borders of parts and pieces depend on sizes alone, so that the number of threads changes no bit.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/epilogue.h"
#include "core/isa.h"
#include "core/stream.h"
#include "ops/group_norm/cpu_pieces.h"

namespace pvk::group_norm {
namespace PVK_ISA {
namespace {

template <typename T>
PVK_INLINE void write_stats(const GroupNormParams& p, int64_t group, double mean, double square) {
  const double count = double(p.C / p.G * p.S);
  static_cast<T*>(p.stats)[group] = T(mean);
  static_cast<T*>(p.stats)[p.N * p.G + group] = T(1.0 / __builtin_sqrt(square / count + p.eps));
}

// body(i, lanes) -> value of `count` neighbours, with the residual added, activated, stored at `offset` of the output.
template <Activation kActivation, typename scalar_t, typename Body>
PVK_INLINE void finish(const GroupNormParams& p, int64_t offset, int64_t count, bool past, const Body& body) {
  using T = opmath_t<scalar_t>;
  scalar_t* const output = static_cast<scalar_t*>(p.output) + offset;
  if (p.residual != nullptr) {
    const scalar_t* const residual = static_cast<const scalar_t*>(p.residual) + offset;
    return write_row(output, count, past, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      return activate<kActivation, T>(body(i, lanes) + load_lanes(residual + i, lanes));
    });
  }
  write_row(output, count, past, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    return activate<kActivation, T>(body(i, lanes));
  });
}

template <typename scalar_t>
bool is_streamed(const GroupNormParams& p, int64_t row) {
  const int64_t bytes = p.N * p.C * p.S * int64_t(sizeof(scalar_t));
  return streams(static_cast<scalar_t*>(p.output), row, bytes);
}

// ---- planes ----

template <typename scalar_t>
void moments_of_planes(const GroupNormParams& p, int64_t group, bool inside) {
  const int64_t count = p.C / p.G * p.S, parts = ceil_div(count, kElementsOfPart);
  const scalar_t* const x = static_cast<const scalar_t*>(p.input) + group * count;
  Buffer<MergedMoments> moments(parts);
  over_threads_if(inside, parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      moments[i] = moments_of_run(x + count * i / parts, count * (i + 1) / parts - count * i / parts);
  });
  MergedMoments all = moments[0];
  for (int64_t i = 1; i < parts; ++i) all.add(moments[i].count, moments[i].mean, moments[i].square);
  write_stats<opmath_t<scalar_t>>(p, group, all.mean, all.square);
}

template <Activation kActivation, typename scalar_t>
void forward_planes(const GroupNormParams& p) {
  using T = opmath_t<scalar_t>;
  const int64_t channels = p.C / p.G;
  const bool past = is_streamed<scalar_t>(p, p.S);
  for_each_over_threads(p.N * p.G, [&](int64_t group, bool inside) {
    moments_of_planes<scalar_t>(p, group, inside);
    const T mean = static_cast<const T*>(p.stats)[group], rstd = static_cast<const T*>(p.stats)[p.N * p.G + group];
    over_threads_if(inside, channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t channel = channels - 1 - i, c = group % p.G * channels + channel;
        const int64_t offset = (group * channels + channel) * p.S;
        const scalar_t* const x = static_cast<const scalar_t*>(p.input) + offset;
        const Vec<T> scale = splat(rstd * element(p.weight, p.weight_dtype, c, T(1)));
        const Vec<T> shift = splat(element(p.bias, p.weight_dtype, c, T(0)));
        finish<kActivation, scalar_t>(p, offset, p.S, past, [&](int64_t k, int lanes) __attribute__((always_inline)) {
          return fma(load_lanes(x + k, lanes) - mean, scale, shift);
        });
      }
      if (past) end_of_streams();
    });
  });
}

// ---- rows ----

// The moments of the groups of a sample, from those of its channels, which have equally many values in a part: mean and
// square, [parts, 2, features]. means: [parts, features].
template <typename scalar_t, typename T>
void moments_of_groups(const GroupNormParams& p, const Rows& rows, int64_t n, const T* moments, Buffer<double>& means) {
  const scalar_t* const x = static_cast<const scalar_t*>(p.input) + n * p.S * p.C;
  const int64_t channels = p.C / p.G, features = rows.features;
  for (int64_t part = 0; part < rows.parts; ++part) {
    const scalar_t* const base = x + rows.begin(part) * features;
    for (int64_t f = 0; f < features; ++f)
      means[part * features + f] = double(to_float(base[f])) + double(moments[part * 2 * features + f]);
  }
  for (int64_t g = 0; g < p.G; ++g) {
    const auto each = [&](const auto& body) __attribute__((always_inline)) {
      for (int64_t part = 0; part < rows.parts; ++part)
        for (int64_t first = g * channels; first < features; first += p.C)
          for (int64_t f = first; f < first + channels; ++f)
            body(part, f, double(rows.begin(part + 1) - rows.begin(part)), means[part * features + f]);
    };
    // Means are taken beside the first of them, so that equal ones give themselves.
    const double start = means[g * channels], share = 1.0 / double(channels * p.S);
    double mean = 0, square = 0;
    each([&](int64_t, int64_t, double count, double other)
             __attribute__((always_inline)) { mean += (other - start) * (count * share); });
    mean += start;
    each([&](int64_t part, int64_t f, double count, double other) __attribute__((always_inline)) {
      square += double(moments[(part * 2 + 1) * features + f]) + count * ((other - mean) * (other - mean));
    });
    write_stats<T>(p, n * p.G + g, mean, square);
  }
}

template <Activation kActivation, typename scalar_t>
void forward_rows(const GroupNormParams& p) {
  using T = opmath_t<scalar_t>;
  const Rows rows(p);
  const int64_t features = rows.features, channels = p.C / p.G;
  const bool past = is_streamed<scalar_t>(p, features);
  for_each_over_threads(p.N, [&](int64_t n, bool inside) {
    const int64_t sample = n * p.S * p.C;
    const scalar_t* const x = static_cast<const scalar_t*>(p.input) + sample;
    Buffer<T> moments(rows.parts * 2 * features);
    over_threads_if(inside, rows.parts, [&](int64_t begin, int64_t end) {
      Buffer<T> sums(3 * features);
      for (int64_t part = begin; part < end; ++part) {
        T* const mean = &moments[part * 2 * features];
        const int64_t first = rows.begin(part), last = rows.begin(part + 1);
        moments_of_rows(x + first * features, last - first, features, rows.piece, mean, mean + features, sums.data());
      }
    });
    Buffer<double> means(rows.parts * features);
    moments_of_groups<scalar_t>(p, rows, n, moments.data(), means);
    const T* const stats = static_cast<const T*>(p.stats) + n * p.G;
    Buffer<T> affine(3 * features);
    T *const center = affine.data(), *const scale = center + features, *const shift = scale + features;
    for (int64_t f = 0; f < features; ++f) {
      const int64_t c = f % p.C, g = c / channels;
      center[f] = stats[g];
      scale[f] = stats[p.N * p.G + g] * element(p.weight, p.weight_dtype, c, T(1));
      shift[f] = element(p.bias, p.weight_dtype, c, T(0));
    }
    rows.for_pieces_backwards(inside, [&](int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        const scalar_t* const from = x + row * features;
        finish<kActivation, scalar_t>(p, sample + row * features, features, past,
                                      [&](int64_t f, int lanes) __attribute__((always_inline)) {
                                        return fma(load_lanes(from + f, lanes) - load_lanes(center + f, lanes),
                                                   load_lanes(scale + f, lanes), load_lanes(shift + f, lanes));
                                      });
      }
      if (past) end_of_streams();
    });
  });
}

}  // namespace

void forward(const GroupNormParams& p) {
  with_activation(p.activation, [&](auto tag) {
    dispatch_floating(p.dtype, [&](auto scalar) {
      constexpr Activation kActivation = decltype(tag)::value;
      using scalar_t = decltype(scalar);
      return p.rows ? forward_rows<kActivation, scalar_t>(p) : forward_planes<kActivation, scalar_t>(p);
    });
  });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, GroupNormParams)

#if defined(PVK_ISA_BASELINE)
int64_t scratch_bytes(const GroupNormParams&) {
  return 0;
}
#endif

}  // namespace pvk::group_norm
