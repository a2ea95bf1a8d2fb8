// Batch normalisation on the CPU, backward; the map is cut as by the forward (cpu.cpp).
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/stream.h"
#include "ops/batch_norm/cpu_pieces.h"

namespace pvk::batch_norm {
namespace PVK_ISA {
namespace {

// The gradient before the activation, from the one behind it and the activation's result; NaN passes.
template <Activation kActivation, typename T>
PVK_INLINE Vec<T> before(Vec<T> grad, Vec<T> result) {
  if constexpr (kActivation == Activation::kRelu) return result <= T(0) ? Vec<T>{} : grad;
  if constexpr (kActivation == Activation::kRelu6) {
    const Vec<T> above = result <= T(0) ? Vec<T>{} : grad;
    return result >= T(6) ? Vec<T>{} : above;
  }
  return grad;
}

// What the sums A = sum of grad and B = sum of grad * (x - mean) of a channel make of its gradients:
// grad_input = (grad - from_sum - (x - mean) * from_product) * scale.
template <typename T>
struct Slopes {
  T center, from_sum, from_product, scale;

  Slopes(const BatchNormBackwardParams& p, int64_t c, double sum, double product) {
    const T* const stats = static_cast<const T*>(p.stats);
    const double count = double(p.N * p.S), rstd = double(stats[p.C + c]);
    center = stats[c];
    scale = T(rstd * double(element(p.weight, p.weight_dtype, c, T(1))));
    from_sum = p.training ? T(sum / count) : T(0);
    from_product = p.training ? T(product * rstd * rstd / count) : T(0);
    write(p, p.grad_weight, c, product * rstd);
    write(p, p.grad_bias, c, sum);
  }

 private:
  static void write(const BatchNormBackwardParams& p, void* target, int64_t c, double value) {
    if (target == nullptr) return;
    dispatch_floating(p.weight_dtype, [&](auto scalar) {
      using weight_t = decltype(scalar);
      static_cast<weight_t*>(target)[c] = from_float<weight_t>(opmath_t<weight_t>(value));
    });
  }
};

// The pointers of a map's backward at an offset.
template <Activation kActivation, typename scalar_t>
struct MapBackward {
  using T = opmath_t<scalar_t>;
  const scalar_t *x, *grad, *result;
  scalar_t *grad_input, *grad_residual;

  MapBackward(const BatchNormBackwardParams& p, int64_t offset)
      : x(static_cast<const scalar_t*>(p.input) + offset),
        grad(static_cast<const scalar_t*>(p.grad) + offset),
        result(static_cast<const scalar_t*>(p.output) + offset),
        grad_input(static_cast<scalar_t*>(p.grad_input) + offset),
        grad_residual(static_cast<scalar_t*>(p.grad_residual) + offset) {}

  PVK_INLINE Vec<T> gradient(int64_t i, int lanes) const {
    const Vec<T> g = load_lanes(grad + i, lanes);
    if constexpr (kActivation == Activation::kNone) return g;
    return before<kActivation, T>(g, load_lanes(result + i, lanes));
  }
};

template <Activation kActivation, typename scalar_t>
void backward_planes(const BatchNormBackwardParams& p) {
  using T = opmath_t<scalar_t>;
  using Map = MapBackward<kActivation, scalar_t>;
  const bool past = streams(static_cast<scalar_t*>(p.grad_input), p.S, p.N * p.C * p.S * int64_t(sizeof(scalar_t)));
  parallel_for(p.C, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const T center = static_cast<const T*>(p.stats)[c];
      WideSum<T> total, total_product;
      for (int64_t n = 0; n < p.N; ++n) {
        for (int64_t first = 0; first < p.S; first += kElementsOfSum) {
          const Map map(p, (n * p.C + c) * p.S + first);
          Vec<T> sum[4] = {}, product[4] = {};
          for_row<T>(min_of(kElementsOfSum, p.S - first),
                     [&](int64_t i, int lanes, int v) __attribute__((always_inline)) {
                       const Vec<T> g = map.gradient(i, lanes);
                       sum[v] += g;
                       product[v] = fma(g, load_lanes(map.x + i, lanes) - center, product[v]);
                     });
          total.add((sum[0] + sum[1]) + (sum[2] + sum[3]));
          total_product.add((product[0] + product[1]) + (product[2] + product[3]));
        }
      }
      const Slopes<T> slopes(p, c, total.value(), total_product.value());
      if (p.grad_input == nullptr && p.grad_residual == nullptr) continue;
      const Vec<T> scale = splat(slopes.scale), slope = splat(-slopes.from_product);
      for (int64_t n = p.N; n-- > 0;) {
        const Map map(p, (n * p.C + c) * p.S);
        const auto result = [&](int64_t i, int lanes, Vec<T> g) __attribute__((always_inline)) {
          return fma(load_lanes(map.x + i, lanes) - slopes.center, slope, g - slopes.from_sum) * scale;
        };
        if (p.grad_residual != nullptr) {
          for_row<T>(p.S, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
            const Vec<T> g = map.gradient(i, lanes);
            store_lanes(map.grad_residual + i, g, lanes);
            if (p.grad_input != nullptr) store_lanes(map.grad_input + i, result(i, lanes, g), lanes);
          });
        } else if (past) {
          for_row<T>(p.S, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
            stream(map.grad_input + i, result(i, lanes, map.gradient(i, lanes)));
          });
        } else {
          for_row<T>(p.S, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
            store_lanes(map.grad_input + i, result(i, lanes, map.gradient(i, lanes)), lanes);
          });
        }
      }
    }
    if (past) end_of_streams();
  });
}

// Adds Rows rows to the sums of every channel.
template <int Rows, typename Map, typename T>
PVK_INLINE void add_rows(const Map& map, int64_t C, const T* center, T* sums, T* products) {
  for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
    const Vec<T> mean = load_lanes(center + c, lanes);
    Vec<T> sum = load_lanes(sums + c, lanes), product = load_lanes(products + c, lanes);
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) {
      const Vec<T> g = map.gradient(k * C + c, lanes);
      sum += g;
      product = fma(g, load_lanes(map.x + k * C + c, lanes) - mean, product);
    }
    store_lanes(sums + c, sum, lanes);
    store_lanes(products + c, product, lanes);
  });
}

template <Activation kActivation, typename scalar_t>
void backward_rows(const BatchNormBackwardParams& p) {
  using T = opmath_t<scalar_t>;
  using Map = MapBackward<kActivation, scalar_t>;
  const int64_t pixels = p.N * p.S, C = p.C, parts = parts_of(pixels, C);
  double* const partials = static_cast<double*>(p.partials);
  const T* const center = static_cast<const T*>(p.stats);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(2 * C);
    T *const sums = buffer.data(), *const products = sums + C;
    for (int64_t part = begin; part < end; ++part) {
      double* const totals = partials + part * 2 * C;
      for (int64_t c = 0; c < 2 * C; ++c) {
        totals[c] = 0;
        sums[c] = T(0);
      }
      const int64_t first = pixels * part / parts, last = pixels * (part + 1) / parts;
      for (int64_t row = first; row < last; row += kRows) {
        if (last - row >= kRows) {
          add_rows<kRows>(Map(p, row * C), C, center, sums, products);
        } else {
          for (int64_t k = row; k < last; ++k) add_rows<1>(Map(p, k * C), C, center, sums, products);
        }
        if ((row - first) % kRowsOfSum != kRowsOfSum - kRows && row + kRows < last) continue;
        for (int64_t c = 0; c < 2 * C; ++c) {
          totals[c] += double(sums[c]);
          sums[c] = T(0);
        }
      }
    }
  });
  Buffer<T> slopes(4 * C);
  for (int64_t c = 0; c < C; ++c) {
    double sum = 0, product = 0;
    for (int64_t part = 0; part < parts; ++part) {
      sum += partials[part * 2 * C + c];
      product += partials[(part * 2 + 1) * C + c];
    }
    const Slopes<T> one(p, c, sum, product);
    slopes[c] = one.center;
    slopes[C + c] = one.from_sum;
    slopes[2 * C + c] = -one.from_product;
    slopes[3 * C + c] = one.scale;
  }
  if (p.grad_input == nullptr && p.grad_residual == nullptr) return;
  const bool past = streams(static_cast<scalar_t*>(p.grad_input), C, pixels * C * int64_t(sizeof(scalar_t)));
  for_pieces_backwards(pixels, C, [&](int64_t first, int64_t count) {
    const T* const s = slopes.data();
    for (int64_t row = first; row < first + count; ++row) {
      const Map map(p, row * C);
      const auto result = [&](int64_t c, int lanes, Vec<T> g) __attribute__((always_inline)) {
        const Vec<T> difference = load_lanes(map.x + c, lanes) - load_lanes(s + c, lanes);
        return fma(difference, load_lanes(s + 2 * C + c, lanes), g - load_lanes(s + C + c, lanes)) *
               load_lanes(s + 3 * C + c, lanes);
      };
      if (p.grad_residual != nullptr) {
        for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
          const Vec<T> g = map.gradient(c, lanes);
          store_lanes(map.grad_residual + c, g, lanes);
          if (p.grad_input != nullptr) store_lanes(map.grad_input + c, result(c, lanes, g), lanes);
        });
      } else if (past) {
        for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
          stream(map.grad_input + c, result(c, lanes, map.gradient(c, lanes)));
        });
      } else {
        for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
          store_lanes(map.grad_input + c, result(c, lanes, map.gradient(c, lanes)), lanes);
        });
      }
    }
    if (past) end_of_streams();
  });
}

template <Activation kActivation>
void backward_of(const BatchNormBackwardParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    return p.rows || p.S == 1 ? backward_rows<kActivation, scalar_t>(p) : backward_planes<kActivation, scalar_t>(p);
  });
}

}  // namespace

void backward(const BatchNormBackwardParams& p) {
  if (p.activation == Activation::kRelu) return backward_of<Activation::kRelu>(p);
  if (p.activation == Activation::kRelu6) return backward_of<Activation::kRelu6>(p);
  backward_of<Activation::kNone>(p);
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, backward, BatchNormBackwardParams)

}  // namespace pvk::batch_norm
