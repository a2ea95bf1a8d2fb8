// Group normalisation on the CPU, backward; maps are cut as by the forward (cpu.cpp).
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/stream.h"
#include "ops/group_norm/cpu_pieces.h"

namespace pvk::group_norm {
namespace PVK_ISA {
namespace {

// So many go to sums in T, which then go to those in double: shorter chains of rounding.
constexpr int64_t kRowsOfSum = 16, kElementsOfSum = 512;

// The pointers of a map's backward at an offset.
template <Activation kActivation, typename scalar_t>
struct MapBackward {
  using T = opmath_t<scalar_t>;
  const scalar_t *x, *grad, *result;
  scalar_t *grad_input, *grad_residual;

  MapBackward(const GroupNormBackwardParams& p, int64_t offset)
      : x(static_cast<const scalar_t*>(p.input) + offset),
        grad(static_cast<const scalar_t*>(p.grad) + offset),
        result(static_cast<const scalar_t*>(p.output) + offset),
        grad_input(static_cast<scalar_t*>(p.grad_input) + offset),
        grad_residual(static_cast<scalar_t*>(p.grad_residual) + offset) {}

  PVK_INLINE Vec<T> gradient(int64_t i, int lanes) const {
    const Vec<T> g = load_lanes(grad + i, lanes);
    if constexpr (kActivation == Activation::kNone) return g;
    return before_activation<kActivation, T>(g, load_lanes(result + i, lanes));
  }

  // body(i, lanes, gradient) -> the gradient of the input, of `count` neighbours.
  template <typename Body>
  PVK_INLINE void finish(const GroupNormBackwardParams& p, int64_t count, bool past, const Body& body) const {
    if (p.grad_residual != nullptr) {
      return for_row<T>(count, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
        const Vec<T> g = gradient(i, lanes);
        store_lanes(grad_residual + i, g, lanes);
        if (p.grad_input != nullptr) store_lanes(grad_input + i, body(i, lanes, g), lanes);
      });
    }
    write_row(grad_input, count, past,
              [&](int64_t i, int lanes) __attribute__((always_inline)) { return body(i, lanes, gradient(i, lanes)); });
  }
};

template <typename scalar_t>
bool is_streamed(const GroupNormBackwardParams& p, int64_t row) {
  const int64_t bytes = p.N * p.C * p.S * int64_t(sizeof(scalar_t));
  return p.grad_residual == nullptr && streams(static_cast<scalar_t*>(p.grad_input), row, bytes);
}

// With A and B the sums of grad * weight and of grad * weight * (x - mean) of a group, m its values:
// grad_input = (grad * weight - from_sum - (x - mean) * from_product) * rstd.
struct Slopes {
  double from_sum, from_product;

  // sums: of grad and of grad * (x - mean) of the channels of group g.
  template <typename T>
  Slopes(const GroupNormBackwardParams& p, int64_t g, double rstd, const double* sums, const double* products, T) {
    const int64_t channels = p.C / p.G;
    const double count = double(channels * p.S);
    double sum = 0, product = 0;
    for (int64_t i = 0; i < channels; ++i) {
      const double weight = double(element(p.weight, p.weight_dtype, g * channels + i, T(1)));
      sum += sums[i] * weight;
      product += products[i] * weight;
    }
    from_sum = sum / count;
    from_product = product * rstd * rstd / count;
  }
};

// sums: [N, 2, C], of grad and of grad * (x - mean).
template <typename T>
void gradients_of_vectors(const GroupNormBackwardParams& p, const double* sums) {
  if (p.grad_weight == nullptr && p.grad_bias == nullptr) return;
  const T* const rstd = static_cast<const T*>(p.stats) + p.N * p.G;
  const auto write = [&](void* target, int64_t c, double value) {
    if (target == nullptr) return;
    dispatch_floating(p.weight_dtype, [&](auto scalar) {
      using weight_t = decltype(scalar);
      static_cast<weight_t*>(target)[c] = from_float<weight_t>(opmath_t<weight_t>(value));
    });
  };
  const int64_t channels = p.C / p.G;
  for (int64_t c = 0; c < p.C; ++c) {
    double by_weight = 0, by_bias = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      by_bias += sums[n * 2 * p.C + c];
      by_weight += sums[(n * 2 + 1) * p.C + c] * double(rstd[n * p.G + c / channels]);
    }
    write(p.grad_weight, c, by_weight);
    write(p.grad_bias, c, by_bias);
  }
}

template <Activation kActivation, typename scalar_t>
void backward_planes(const GroupNormBackwardParams& p) {
  using T = opmath_t<scalar_t>;
  using Map = MapBackward<kActivation, scalar_t>;
  const int64_t channels = p.C / p.G;
  const bool past = is_streamed<scalar_t>(p, p.S);
  Buffer<double> all(p.N * 2 * p.C);
  for_each_over_threads(p.N * p.G, [&](int64_t group, bool inside) {
    const int64_t n = group / p.G, g = group % p.G;
    const T mean = static_cast<const T*>(p.stats)[group], rstd = static_cast<const T*>(p.stats)[p.N * p.G + group];
    double *const sums = &all[n * 2 * p.C + g * channels], *const products = sums + p.C;
    over_threads_if(inside, channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        WideSum<T> total, total_product;
        for (int64_t first = 0; first < p.S; first += kElementsOfSum) {
          const Map map(p, (group * channels + i) * p.S + first);
          Vec<T> sum[4] = {}, product[4] = {};
          for_row<T>(min_of(kElementsOfSum, p.S - first),
                     [&](int64_t k, int lanes, int v) __attribute__((always_inline)) {
                       const Vec<T> g = map.gradient(k, lanes);
                       sum[v] += g;
                       product[v] = fma(g, difference(load_lanes(map.x + k, lanes), mean, lanes), product[v]);
                     });
          total.add((sum[0] + sum[1]) + (sum[2] + sum[3]));
          total_product.add((product[0] + product[1]) + (product[2] + product[3]));
        }
        sums[i] = total.value();
        products[i] = total_product.value();
      }
    });
    if (p.grad_input == nullptr && p.grad_residual == nullptr) return;
    const Slopes slopes(p, g, double(rstd), sums, products, T(1));
    const Vec<T> from_sum = splat(T(slopes.from_sum)), slope = splat(T(-slopes.from_product));
    over_threads_if(inside, channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t channel = channels - 1 - i;
        const Map map(p, (group * channels + channel) * p.S);
        const T weight = element(p.weight, p.weight_dtype, g * channels + channel, T(1));
        map.finish(p, p.S, past, [&](int64_t k, int lanes, Vec<T> grad) __attribute__((always_inline)) {
          return fma(load_lanes(map.x + k, lanes) - mean, slope, grad * weight - from_sum) * rstd;
        });
      }
      if (past) end_of_streams();
    });
  });
  gradients_of_vectors<T>(p, all.data());
}

// Adds Count rows to the sums of every feature.
template <int Count, typename Map, typename T>
PVK_INLINE void add_rows(const Map& map, int64_t features, const T* center, T* sums, T* products) {
  for_row<T>(features, [&](int64_t f, int lanes, int) __attribute__((always_inline)) {
    const Vec<T> mean = load_lanes(center + f, lanes);
    Vec<T> sum = load_lanes(sums + f, lanes), product = load_lanes(products + f, lanes);
#pragma GCC unroll 4
    for (int k = 0; k < Count; ++k) {
      const int64_t ahead = (k + kRowsAhead) * features + f;
      __builtin_prefetch(map.x + ahead);
      __builtin_prefetch(map.grad + ahead);
      const Vec<T> g = map.gradient(k * features + f, lanes);
      sum += g;
      product = fma(g, load_lanes(map.x + k * features + f, lanes) - mean, product);
    }
    store_lanes(sums + f, sum, lanes);
    store_lanes(products + f, product, lanes);
  });
}

// The sums of a part of a sample's rows, totals: [2, features].
template <Activation kActivation, typename scalar_t, typename T>
void sums_of_part(const GroupNormBackwardParams& p, const Rows& rows, int64_t sample, int64_t part, const T* center,
                  double* totals, T* sums) {
  using Map = MapBackward<kActivation, scalar_t>;
  const int64_t features = rows.features, first = rows.begin(part), last = rows.begin(part + 1);
  const auto flush = [&](bool at_first) {
    for (int64_t f = 0; f < 2 * features; ++f) {
      totals[f] = at_first ? 0 : totals[f] + double(sums[f]);
      sums[f] = T(0);
    }
  };
  flush(true);
  for (int64_t row = first; row < last; row += kRowsAtOnce) {
    const int64_t offset = sample + row * features;
    if (last - row >= kRowsAtOnce) {
      add_rows<kRowsAtOnce>(Map(p, offset), features, center, sums, sums + features);
    } else {
      for (int64_t k = 0; k < last - row; ++k)
        add_rows<1>(Map(p, offset + k * features), features, center, sums, sums + features);
    }
    if ((row - first) % kRowsOfSum == kRowsOfSum - kRowsAtOnce || row + kRowsAtOnce >= last) flush(false);
  }
}

template <Activation kActivation, typename scalar_t>
void backward_rows(const GroupNormBackwardParams& p) {
  using T = opmath_t<scalar_t>;
  using Map = MapBackward<kActivation, scalar_t>;
  const Rows rows(p);
  const int64_t features = rows.features, channels = p.C / p.G;
  const bool past = is_streamed<scalar_t>(p, features);
  Buffer<double> all(p.N * 2 * p.C);
  for_each_over_threads(p.N, [&](int64_t n, bool inside) {
    const int64_t sample = n * p.S * p.C;
    const T *const mean = static_cast<const T*>(p.stats) + n * p.G, *const rstd = mean + p.N * p.G;
    Buffer<T> constants(5 * features);
    T *const center = constants.data(), *const weight = center + features, *const from_sum = weight + features;
    T *const slope = from_sum + features, *const scale = slope + features;
    for (int64_t f = 0; f < features; ++f) center[f] = mean[f % p.C / channels];
    Buffer<double> partials(rows.parts * 2 * features);
    over_threads_if(inside, rows.parts, [&](int64_t begin, int64_t end) {
      Buffer<T> sums(2 * features);
      for (int64_t part = begin; part < end; ++part)
        sums_of_part<kActivation, scalar_t>(p, rows, sample, part, center, &partials[part * 2 * features], sums.data());
    });
    double* const sums = &all[n * 2 * p.C];
    for (int64_t c = 0; c < 2 * p.C; ++c) {
      sums[c] = 0;
      const int64_t feature = c < p.C ? c : features + c - p.C;
      for (int64_t part = 0; part < rows.parts; ++part)
        for (int64_t f = 0; f < features; f += p.C) sums[c] += partials[part * 2 * features + feature + f];
    }
    if (p.grad_input == nullptr && p.grad_residual == nullptr) return;
    for (int64_t g = 0; g < p.G; ++g) {
      const Slopes slopes(p, g, double(rstd[g]), sums + g * channels, sums + p.C + g * channels, T(1));
      for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
        const T factor = element(p.weight, p.weight_dtype, c, T(1));
        for (int64_t f = c; f < features; f += p.C) {
          weight[f] = factor;
          scale[f] = rstd[g];
          from_sum[f] = T(slopes.from_sum);
          slope[f] = T(-slopes.from_product);
        }
      }
    }
    rows.for_pieces_backwards(inside, [&](int64_t first, int64_t count) {
      for (int64_t row = first; row < first + count; ++row) {
        const Map map(p, sample + row * features);
        map.finish(p, features, past, [&](int64_t f, int lanes, Vec<T> grad) __attribute__((always_inline)) {
          const Vec<T> own = grad * load_lanes(weight + f, lanes) - load_lanes(from_sum + f, lanes);
          const Vec<T> difference = load_lanes(map.x + f, lanes) - load_lanes(center + f, lanes);
          return fma(difference, load_lanes(slope + f, lanes), own) * load_lanes(scale + f, lanes);
        });
      }
      if (past) end_of_streams();
    });
  });
  gradients_of_vectors<T>(p, all.data());
}

template <Activation kActivation>
void backward_of(const GroupNormBackwardParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    return p.rows ? backward_rows<kActivation, scalar_t>(p) : backward_planes<kActivation, scalar_t>(p);
  });
}

}  // namespace

void backward(const GroupNormBackwardParams& p) {
  if (p.activation == Activation::kRelu) return backward_of<Activation::kRelu>(p);
  if (p.activation == Activation::kRelu6) return backward_of<Activation::kRelu6>(p);
  backward_of<Activation::kNone>(p);
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, backward, GroupNormBackwardParams)

#if defined(PVK_ISA_BASELINE)
int64_t scratch_bytes(const GroupNormBackwardParams&) {
  return 0;
}
#endif

}  // namespace pvk::group_norm
