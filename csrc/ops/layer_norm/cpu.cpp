// Layer normalisation on the CPU: a row stays in the cache while it is read for its mean, its variance and its result.
//
// Results do not depend on the number of threads, nor on the other rows: a row is one thread's. The gradients of weight
// and bias are sums over parts of the rows, whose borders depend on M alone, added in order.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/moments.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/stream.h"
#include "ops/layer_norm/layer_norm.h"

namespace pvk::layer_norm {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int64_t kElementsOfPiece = 16384;
constexpr int kRows = 4;  // that go through the backward together

// [N] of opmath: the vector of a dtype, or one value.
template <typename T>
class Vector {
 public:
  Vector(const void* data, DType dtype, int64_t N, T otherwise) {
    if (data != nullptr && dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32)) {
      data_ = static_cast<const T*>(data);
      return;
    }
    buffer_.reserve(N);
    for (int64_t n = 0; n < N; ++n) buffer_[n] = otherwise;
    if (data != nullptr) {
      dispatch_floating(dtype, [&](auto scalar) {
        const auto* source = static_cast<const decltype(scalar)*>(data);
        for (int64_t n = 0; n < N; ++n) buffer_[n] = T(to_float(source[n]));
      });
    }
    data_ = buffer_.data();
  }
  const T* data() const { return data_; }

 private:
  Buffer<T> buffer_;
  const T* data_;
};

template <typename scalar_t>
void forward_typed(const LayerNormParams& p) {
  using T = opmath_t<scalar_t>;
  const Vector<T> weight(p.weight, p.weight_dtype, p.N, T(1)), bias(p.bias, p.weight_dtype, p.N, T(0));
  T* const stats = static_cast<T*>(p.stats);
  const bool past = streams(static_cast<scalar_t*>(p.output), p.N, p.M * p.N * int64_t(sizeof(scalar_t)));
  parallel_for(p.M, ceil_div(kElementsOfPiece, p.N), [&](int64_t begin, int64_t end) {
    const T *const gamma = weight.data(), *const beta = bias.data();
    for (int64_t m = begin; m < end; ++m) {
      const scalar_t* x = static_cast<const scalar_t*>(p.input) + m * p.N;
      if (p.residual != nullptr) {
        const scalar_t* const residual = static_cast<const scalar_t*>(p.residual) + m * p.N;
        scalar_t* const sum = static_cast<scalar_t*>(p.sum) + m * p.N;
        for_row<T>(p.N, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
          store_lanes(sum + i, load_lanes(x + i, lanes) + load_lanes(residual + i, lanes), lanes);
        });
        x = sum;
      }
      const Moments<T> moments = moments_of_row(x, p.N);
      const T mean = moments.mean, rstd = moments.reciprocal_deviation(p.N, p.eps);
      stats[m] = mean;
      stats[p.M + m] = rstd;
      scalar_t* const output = static_cast<scalar_t*>(p.output) + m * p.N;
      const auto result = [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const Vec<T> value = (load_lanes(x + i, lanes) - mean) * rstd;
        return fma(value, load_lanes(gamma + i, lanes), load_lanes(beta + i, lanes));
      };
      write_row(output, p.N, past, result);
    }
    if (past) end_of_streams();
  });
}

// With g = grad * weight and y = (x - mean) * rstd: grad_input = rstd * (g - mean of g - y * mean of g y).
// by_weight and by_bias, [N], get the sums over these rows of grad * y and of grad; or are null.
template <int Rows, typename scalar_t, typename T>
void rows_backward(const LayerNormBackwardParams& p, int64_t m, const T* gamma, T* by_weight, T* by_bias) {
  const int64_t N = p.N;
  const scalar_t* const x = static_cast<const scalar_t*>(p.input) + m * N;
  const scalar_t* const grad = static_cast<const scalar_t*>(p.grad) + m * N;
  T mean[Rows], rstd[Rows];
  for (int r = 0; r < Rows; ++r) {
    mean[r] = static_cast<const T*>(p.stats)[m + r];
    rstd[r] = static_cast<const T*>(p.stats)[p.M + m + r];
  }
  Vec<T> sum[Rows] = {}, product[Rows] = {};
  for_row<T>(N, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
    const Vec<T> w = load_lanes(gamma + i, lanes);
    Vec<T> to_weight{}, to_bias{};
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> y = (load_lanes(x + r * N + i, lanes) - mean[r]) * rstd[r], g = load_lanes(grad + r * N + i, lanes);
      const Vec<T> weighed = g * w;
      to_bias += g;
      to_weight = fma(g, y, to_weight);
      sum[r] += weighed;
      product[r] = fma(weighed, y, product[r]);
    }
    if (by_weight != nullptr) {
      store_lanes(by_weight + i, load_lanes(by_weight + i, lanes) + to_weight, lanes);
      store_lanes(by_bias + i, load_lanes(by_bias + i, lanes) + to_bias, lanes);
    }
  });
  if (p.grad_input == nullptr) return;
  const bool past = streams(static_cast<scalar_t*>(p.grad_input), N, p.M * N * int64_t(sizeof(scalar_t)));
  const T share = T(1) / T(N);
  for (int r = 0; r < Rows; ++r) {
    const T scale = rstd[r], center = mean[r];
    const T mean_grad = sum_of_lanes<T>(sum[r]) * share, mean_product = sum_of_lanes<T>(product[r]) * share;
    const int64_t row = (m + r) * N;
    scalar_t* const target = static_cast<scalar_t*>(p.grad_input) + row;
    const auto by_input = [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const Vec<T> y = (load_lanes(x + r * N + i, lanes) - center) * scale;
      const Vec<T> weighed = load_lanes(grad + r * N + i, lanes) * load_lanes(gamma + i, lanes);
      return (fma(y, splat(-mean_product), weighed) - mean_grad) * scale;
    };
    if (p.grad_sum != nullptr) {
      const scalar_t* const rest = static_cast<const scalar_t*>(p.grad_sum) + row;
      write_row(target, N, past, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        return by_input(i, lanes) + load_lanes(rest + i, lanes);
      });
    } else {
      write_row(target, N, past, by_input);
    }
  }
  if (past) end_of_streams();
}

template <typename T>
void add_parts(const LayerNormBackwardParams& p, int64_t parts, int which, void* target) {
  if (target == nullptr) return;
  T* const sum = static_cast<T*>(p.partials) + which * p.N;
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t n = 0; n < p.N; ++n) sum[n] += sum[part * 2 * p.N + n];
  dispatch_floating(p.weight_dtype, [&](auto scalar) {
    using weight_t = decltype(scalar);
    weight_t* const result = static_cast<weight_t*>(target);
    for (int64_t n = 0; n < p.N; ++n) result[n] = from_float<weight_t>(opmath_t<weight_t>(parts > 0 ? sum[n] : T(0)));
  });
}

template <typename scalar_t>
void backward_typed(const LayerNormBackwardParams& p) {
  using T = opmath_t<scalar_t>;
  const Vector<T> weight(p.weight, p.weight_dtype, p.N, T(1));
  const auto rows = [&](int64_t begin, int64_t end, T* by_weight, T* by_bias) {
    int64_t m = begin;
    for (; m + kRows <= end; m += kRows) rows_backward<kRows, scalar_t>(p, m, weight.data(), by_weight, by_bias);
    for (; m < end; ++m) rows_backward<1, scalar_t>(p, m, weight.data(), by_weight, by_bias);
  };
  if (p.grad_weight == nullptr && p.grad_bias == nullptr) {
    return parallel_for(p.M, max_of(ceil_div(kElementsOfPiece, p.N), int64_t(kRows)),
                        [&](int64_t begin, int64_t end) { rows(begin, end, nullptr, nullptr); });
  }
  const int64_t parts = parts_of(p.M);
  parallel_for(parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      T* const sums = static_cast<T*>(p.partials) + part * 2 * p.N;
      for (int64_t n = 0; n < 2 * p.N; ++n) sums[n] = T(0);
      rows(p.M * part / parts, p.M * (part + 1) / parts, sums, sums + p.N);
    }
  });
  add_parts<T>(p, parts, 0, p.grad_weight);
  add_parts<T>(p, parts, 1, p.grad_bias);
}

}  // namespace

void forward(const LayerNormParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { forward_typed<decltype(scalar)>(p); });
}

void backward(const LayerNormBackwardParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { backward_typed<decltype(scalar)>(p); });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, LayerNormParams)
PVK_CPU_ENTRY(void, backward, LayerNormBackwardParams)

}  // namespace pvk::layer_norm
