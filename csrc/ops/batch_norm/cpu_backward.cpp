// Batch normalisation on the CPU, backward; the map is cut as by the forward (cpu.cpp).
#include "core/isa.h"
#include "ops/batch_norm/cpu_pieces.h"

namespace pvk::batch_norm {
namespace PVK_ISA {
namespace {

// What the sums A = sum of grad and B = sum of grad * (x - mean) make of the gradients of all channels:
// grad_input = (grad - from_sum - (x - mean) * from_product) * scale. Slope: -from_product.
template <typename T>
class Slopes {
 public:
  explicit Slopes(const BatchNormBackwardParams& p) : C_(p.C), data_(4 * p.C) {
    fill(scale(), p.weight, p.weight_dtype, C_, T(1));
  }
  // sums, products: of some channels, the first one `first`.
  void take(const BatchNormBackwardParams& p, const double* sums, const double* products, int64_t first,
            int64_t count) {
    const T *const mean = static_cast<const T*>(p.stats), *const rstd = mean + C_;
    const double share = p.training ? 1 / double(p.N * p.S) : 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t c = first + k;
      const double factor = double(rstd[c]);
      center()[c] = mean[c];
      scale()[c] = T(factor * double(scale()[c]));
      from_sum()[c] = T(sums[k] * share);
      slope()[c] = T(-products[k] * factor * factor * share);
    }
    write(p, p.grad_bias, first, count, [&](int64_t k) { return sums[k]; });
    write(p, p.grad_weight, first, count, [&](int64_t k) { return products[k] * double(rstd[first + k]); });
  }
  T* center() { return data_.data(); }
  T* from_sum() { return data_.data() + C_; }
  T* slope() { return data_.data() + 2 * C_; }
  T* scale() { return data_.data() + 3 * C_; }

 private:
  template <typename Value>
  static void write(const BatchNormBackwardParams& p, void* target, int64_t first, int64_t count, const Value& value) {
    if (target == nullptr) return;
    dispatch_floating(p.weight_dtype, [&](auto scalar) {
      using weight_t = decltype(scalar);
      weight_t* const grad = static_cast<weight_t*>(target) + first;
      for (int64_t k = 0; k < count; ++k) grad[k] = from_float<weight_t>(opmath_t<weight_t>(value(k)));
    });
  }

  const int64_t C_;
  Buffer<T> data_;
};

// A map's backward, of neighbours from an offset on.
template <bool kActivated, typename scalar_t>
struct Map {
  using T = opmath_t<scalar_t>;
  const scalar_t *input, *grad, *result;
  scalar_t *grad_input, *grad_residual;
  T limit;  // of relu6; of relu NaN, which no result is at or above

  explicit Map(const BatchNormBackwardParams& p)
      : input(static_cast<const scalar_t*>(p.input)),
        grad(static_cast<const scalar_t*>(p.grad)),
        result(static_cast<const scalar_t*>(p.output)),
        grad_input(static_cast<scalar_t*>(p.grad_input)),
        grad_residual(static_cast<scalar_t*>(p.grad_residual)),
        limit(p.activation == Activation::kRelu6 ? T(6) : T(__builtin_nan(""))) {}

  // The gradient before the activation; NaN passes.
  PVK_INLINE Pair<T> gradient(int64_t i, int64_t n) const {
    Pair<T> g = load_elements(grad + i, n);
    if constexpr (kActivated) {
      const Pair<T> at = load_elements(result + i, n);
      g = {at.first <= T(0) ? Vec<T>{} : g.first, at.second <= T(0) ? Vec<T>{} : g.second};
      g = {at.first >= limit ? Vec<T>{} : g.first, at.second >= limit ? Vec<T>{} : g.second};
    }
    return g;
  }

  // The input's part is read in training alone.
  template <bool kTraining>
  PVK_INLINE void write(int64_t i, int64_t n, bool past, const Pair<T>& center, const Pair<T>& from_sum,
                        const Pair<T>& slope, const Pair<T>& scale) const {
    prefetch_ahead(grad + i);
    if constexpr (kTraining) prefetch_ahead(input + i);
    const Pair<T> g = gradient(i, n);
    if (grad_residual != nullptr) store_elements(grad_residual + i, g, n);
    if (grad_input == nullptr) return;
    Pair<T> value = g;
    if constexpr (kTraining) value = fma(load_elements(input + i, n) - center, slope, g - from_sum);
    value = value * scale;
    if (past) return stream_elements(grad_input + i, value);
    store_elements(grad_input + i, value, n);
  }

  // The sums of the gradient, and of its products with x - center.
  PVK_INLINE void add(int64_t i, int64_t n, const Pair<T>& center, Pair<T>& sum, Pair<T>& product) const {
    const Pair<T> g = gradient(i, n);
    sum = sum + g;
    product = fma(g, load_elements(input + i, n) - center, product);
  }
};

template <bool kActivated, typename scalar_t>
void backward_planes(const BatchNormBackwardParams& p) {
  using T = opmath_t<scalar_t>;
  const Map<kActivated, scalar_t> map(p);
  const bool past = goes_past_caches(p.N * p.C * p.S * int64_t(sizeof(scalar_t)));
  const bool sums_wanted = p.training || p.grad_weight != nullptr || p.grad_bias != nullptr;
  const bool maps_wanted = p.grad_input != nullptr || p.grad_residual != nullptr;
  Slopes<T> slopes(p);
  for_blocks_of_channels(p.C, 2 * p.N * p.S * int64_t(sizeof(scalar_t)), [&](int64_t first, int64_t channels) {
    double sums[kChannelsOfBlock] = {}, products[kChannelsOfBlock] = {};
    const T* const mean = static_cast<const T*>(p.stats) + first;
    if (sums_wanted) {
      constexpr int64_t kPiece = kPairsOfSum * kPair<scalar_t>;
      WideSum<T> sum[kChannelsOfBlock], product[kChannelsOfBlock];
      for (int64_t n = 0; n < p.N; ++n) {
        for (int64_t k = 0; k < channels; ++k) {
          const Pair<T> center(mean[k]);
          const int64_t plane = (n * p.C + first + k) * p.S;
          for (int64_t begin = 0; begin < p.S; begin += kPiece) {
            Pair<T> one, other;
            for_pairs<scalar_t>(min_of(kPiece, p.S - begin),
                                [&](int64_t i, int64_t count) __attribute__((always_inline)) {
                                  map.add(plane + begin + i, count, center, one, other);
                                });
            sum[k].add(one.first + one.second);
            product[k].add(other.first + other.second);
          }
        }
      }
      for (int64_t k = 0; k < channels; ++k) {
        sums[k] = sum[k].value();
        products[k] = product[k].value();
      }
    }
    slopes.take(p, sums, products, first, channels);
    if (!maps_wanted) return;
    const auto finish = [&](auto training) __attribute__((always_inline)) {
      constexpr bool kTraining = decltype(training)::value;
      for (int64_t n = p.N; n-- > 0;) {
        for (int64_t c = first; c < first + channels; ++c) {
          const Pair<T> center(slopes.center()[c]), from_sum(slopes.from_sum()[c]), slope(slopes.slope()[c]);
          const Pair<T> scale(slopes.scale()[c]);
          const int64_t plane = (n * p.C + c) * p.S;
          for_pairs_of_target<scalar_t>(map.grad_input + plane, p.S, past && map.grad_input != nullptr,
                                        [&](int64_t i, int64_t count, bool streamed) __attribute__((always_inline)) {
                                          map.template write<kTraining>(plane + i, count, streamed, center, from_sum,
                                                                        slope, scale);
                                        });
        }
      }
    };
    p.training ? finish(Flag<true>{}) : finish(Flag<false>{});
    if (past) end_of_streams();
  });
}

template <bool kActivated, typename scalar_t>
void backward_rows(const BatchNormBackwardParams& p) {
  using T = opmath_t<scalar_t>;
  const Map<kActivated, scalar_t> map(p);
  const Rows rows = rows_of<scalar_t>(p.N * p.S, p.C);
  Buffer<T> in_pairs(4 * rows.pitch);
  T *const center = in_pairs.data(), *const from_sum = center + rows.pitch, *const slope = from_sum + rows.pitch,
           *const scale = slope + rows.pitch;
  const auto of = [](const T* vector)
                      __attribute__((always_inline)) { return Pair<T>{load(vector), load(vector + kLanes<T>)}; };
  spread<scalar_t>(rows, static_cast<const T*>(p.stats), center);
  Buffer<double> sums(2 * p.C);
  for (int64_t c = 0; c < 2 * p.C; ++c) sums[c] = 0;
  if (p.training || p.grad_weight != nullptr || p.grad_bias != nullptr) {
    sums_of_rows<scalar_t>(rows, sums.data(),
                           [&](int64_t offset, int64_t count, int64_t place, int64_t n, Pair<T>& sum, Pair<T>& product)
                               __attribute__((always_inline)) {
                                 const Pair<T> middle = of(center + place);
                                 prefetch_rows(rows, map.input, offset, place);
                                 prefetch_rows(rows, map.grad, offset, place);
                                 for (int64_t r = 0; r < count; ++r)
                                   map.add(offset + r * rows.width, n, middle, sum, product);
                               });
  }
  Slopes<T> slopes(p);
  slopes.take(p, sums.data(), sums.data() + p.C, 0, p.C);
  if (p.grad_input == nullptr && p.grad_residual == nullptr) return;
  spread<scalar_t>(rows, slopes.from_sum(), from_sum);
  spread<scalar_t>(rows, slopes.slope(), slope);
  spread<scalar_t>(rows, slopes.scale(), scale);
  const bool past = p.grad_input != nullptr && rows.width == rows.pitch &&
                    reinterpret_cast<uintptr_t>(p.grad_input) % 64 == 0 &&
                    goes_past_caches(rows.elements() * int64_t(sizeof(scalar_t)));
  const auto finish = [&](auto training) __attribute__((always_inline)) {
    constexpr bool kTraining = decltype(training)::value;
    for_rows(rows, kTraining, past, [&](int64_t offset, int64_t count) {
      for_pairs<scalar_t>(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        map.template write<kTraining>(offset + i, n, past && n == kPair<scalar_t>, of(center + i), of(from_sum + i),
                                      of(slope + i), of(scale + i));
      });
    });
  };
  p.training ? finish(Flag<true>{}) : finish(Flag<false>{});
}

}  // namespace

void backward(const BatchNormBackwardParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const bool rows = p.rows || p.S == 1;
    if (p.activation == Activation::kNone)
      return rows ? backward_rows<false, scalar_t>(p) : backward_planes<false, scalar_t>(p);
    rows ? backward_rows<true, scalar_t>(p) : backward_planes<true, scalar_t>(p);
  });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, backward, BatchNormBackwardParams)

}  // namespace pvk::batch_norm
