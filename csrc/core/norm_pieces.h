// What normalisations on the CPU share: elements of vectors of any dtype, activations' gradients, moments of the
// channels of rows, and their merging.
#pragma once

#include "core/activation.h"
#include "core/moments.h"
#include "core/simd.h"
#include "core/types.h"

namespace pvk::PVK_ISA {

// Element c of a vector of `dtype`; `otherwise` where there is none.
template <typename T>
PVK_INLINE T element(const void* data, DType dtype, int64_t c, T otherwise) {
  if (data == nullptr) return otherwise;
  switch (dtype) {
    case DType::kFloat32:
      return T(static_cast<const float*>(data)[c]);
    case DType::kFloat64:
      return T(static_cast<const double*>(data)[c]);
    case DType::kFloat16:
      return T(to_float(static_cast<const Float16*>(data)[c]));
    case DType::kBFloat16:
      return T(to_float(static_cast<const BFloat16*>(data)[c]));
  }
  return otherwise;
}

// The gradient before the activation, from the one behind it and the activation's result; NaN passes.
template <Activation kActivation, typename T>
PVK_INLINE Vec<T> before_activation(Vec<T> grad, Vec<T> result) {
  if constexpr (kActivation == Activation::kRelu) return result <= T(0) ? Vec<T>{} : grad;
  if constexpr (kActivation == Activation::kRelu6) {
    const Vec<T> above = result <= T(0) ? Vec<T>{} : grad;
    return result >= T(6) ? Vec<T>{} : above;
  }
  return grad;
}

// Count, mean and sum of squared differences, in double (Chan, Golub and LeVeque).
struct MergedMoments {
  double count = 0, mean = 0, square = 0;

  PVK_INLINE void add(double n, double other_mean, double other_square) {
    const double total = count + n, delta = other_mean - mean;
    square += other_square + (count == 0 ? 0 : delta * delta * (count * n / total));
    mean += count == 0 ? other_mean - mean : delta * (n / total);
    count = total;
  }
};

// mean and square, [C], get those of the channels of `rows` more rows of C beside the `before` that they are of; the
// mean is that of the differences to `base`, the first row of all, so that a large one costs no digits. sums: [3, C].
template <typename scalar_t, typename T>
void merge_rows(const scalar_t* x, const scalar_t* base, int64_t rows, int64_t C, int64_t before, T* mean, T* square,
                T* sums) {
  constexpr int kAtOnce = 8;  // rows that are added to the sums of all channels together
  T *const center = sums, *const squares = sums + C, *const missed = sums + 2 * C;
  const T share = T(1) / T(rows), part = T(rows) / T(before + rows), weight = T(before) * part;
  for (int64_t r = 0; r < rows; r += kAtOnce) {  // the mean of differences to the first row
    const int64_t count = r + kAtOnce <= rows ? kAtOnce : rows - r;
    for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
      const Vec<T> first = load_lanes(x + c, lanes);
      Vec<T> sum = r == 0 ? Vec<T>{} : load_lanes(center + c, lanes);
      for (int64_t k = 0; k < count; ++k) sum = fma(load_lanes(x + (r + k) * C + c, lanes) - first, splat(share), sum);
      store_lanes(center + c, r + kAtOnce < rows ? sum : sum + first, lanes);
    });
  }
  for (int64_t r = 0; r < rows; r += kAtOnce) {
    const int64_t count = r + kAtOnce <= rows ? kAtOnce : rows - r;
    for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
      const Vec<T> middle = load_lanes(center + c, lanes);
      Vec<T> sum = r == 0 ? Vec<T>{} : load_lanes(missed + c, lanes);
      Vec<T> product = r == 0 ? Vec<T>{} : load_lanes(squares + c, lanes);
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

}  // namespace pvk::PVK_ISA
