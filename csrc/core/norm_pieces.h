// What normalisations on the CPU share: elements of vectors of any dtype, activations' gradients, moments of the
// channels of rows, and their merging.
#pragma once

#include <type_traits>

#include "core/activation.h"
#include "core/merged_moments.h"
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

// Pieces grow with what came before them: up to so many times as much.
constexpr int64_t kGrowth = 2;

// Of `count` > 0 neighbours. A first piece is read twice, from the L1 cache; the others once, by their differences to
// the mean of all before. Where that mean lies off, what the squares round by it is little beside what it adds to the
// variance, since a piece is not much longer than all before.
template <typename scalar_t>
PVK_INLINE MergedMoments moments_of_run(const scalar_t* x, int64_t count) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kSum = 32 * kLanes<T>, kMost = 8 * kSum;  // kSum: before sums go on in double
  int64_t done = count < kSum ? count : kSum;
  const Moments<T> first = moments_of_row(x, done);
  MergedMoments all;
  all.add(double(done), first.exact_mean, double(first.square));
  while (done < count) {
    int64_t piece = kGrowth * done < kMost ? kGrowth * done : kMost;
    if (piece > count - done) piece = count - done;
    const T center = T(all.mean);
    WideSum<T> total, squares;
    for (int64_t begin = 0; begin < piece; begin += kSum) {
      const scalar_t* const at = x + done + begin;
      Vec<T> sum[4] = {}, square[4] = {};
      for_row<T>(kSum < piece - begin ? kSum : piece - begin,
                 [&](int64_t i, int lanes, int v) __attribute__((always_inline)) {
                   const Vec<T> d = difference(load_lanes(at + i, lanes), center, lanes);
                   sum[v] += d;
                   square[v] = fma(d, d, square[v]);
                 });
      total.add((sum[0] + sum[1]) + (sum[2] + sum[3]));
      squares.add((square[0] + square[1]) + (square[2] + square[3]));
    }
    const double n = double(piece), missed = total.value(), own = squares.value() - missed * (missed / n);
    all.add(n, double(center) + missed / n, own < 0 ? 0 : own);
    done += piece;
  }
  return all;
}

// The rows that are added to the sums of all channels together: several streams, which are asked for ahead of time.
constexpr int kRowsAtOnce = 4, kRowsAhead = 8;

// sums and squares, [C], get those of x - center of `rows` rows.
template <typename scalar_t, typename T>
PVK_INLINE void add_squares(const scalar_t* x, int64_t rows, int64_t C, const T* center, T* sums, T* squares) {
  const auto some = [&](int64_t r, auto count) __attribute__((always_inline)) {
    for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
      const Vec<T> middle = load_lanes(center + c, lanes);
      Vec<T> sum = r == 0 ? Vec<T>{} : load_lanes(sums + c, lanes);
      Vec<T> square = r == 0 ? Vec<T>{} : load_lanes(squares + c, lanes);
      const scalar_t* const at = x + r * C + c;
      for (int k = 0; k < int(count); ++k) {
        __builtin_prefetch(at + (k + kRowsAhead) * C);
        const Vec<T> d = load_lanes(at + k * C, lanes) - middle;
        sum += d;
        square = fma(d, d, square);
      }
      store_lanes(sums + c, sum, lanes);
      store_lanes(squares + c, square, lanes);
    });
  };
  int64_t r = 0;
  for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) some(r, std::integral_constant<int, kRowsAtOnce>{});
  if (r < rows) some(r, int(rows - r));
}

// Of the C channels of `rows` > 0 rows: the mean, as its difference to the first row, so that a large one costs no
// digits, and the squares; pieces of at most `piece` rows, as of moments_of_run(). sums: [3, C].
template <typename scalar_t, typename T>
void moments_of_rows(const scalar_t* x, int64_t rows, int64_t C, int64_t piece, T* mean, T* square, T* sums) {
  T *const center = sums, *const missed = sums + C, *const squares = sums + 2 * C;
  int64_t done = rows < kRowsAtOnce ? rows : kRowsAtOnce;
  const T share = T(1) / T(done);
  for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
    const Vec<T> base = load_lanes(x + c, lanes);
    Vec<T> sum{}, missing{}, own{};
    for (int64_t k = 1; k < done; ++k) sum = fma(load_lanes(x + k * C + c, lanes) - base, splat(share), sum);
    const Vec<T> middle = base + sum;
    for (int64_t k = 0; k < done; ++k) {
      const Vec<T> d = load_lanes(x + k * C + c, lanes) - middle;
      missing += d;
      own = fma(d, d, own);
    }
    store_lanes(mean + c, (middle - base) + missing * share, lanes);
    store_lanes(square + c, at_least(own - missing * (missing * share), T(0)), lanes);
  });
  while (done < rows) {
    int64_t count = kGrowth * done < piece ? kGrowth * done : piece;
    if (count > rows - done) count = rows - done;
    for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
      store_lanes(center + c, load_lanes(x + c, lanes) + load_lanes(mean + c, lanes), lanes);
    });
    add_squares(x + done * C, count, C, center, missed, squares);
    const T each = T(1) / T(count), part = T(count) / T(done + count), weight = T(done) * part;
    for_row<T>(C, [&](int64_t c, int lanes, int) __attribute__((always_inline)) {
      const Vec<T> sum = load_lanes(missed + c, lanes), old = load_lanes(mean + c, lanes);
      const Vec<T> own = at_least(load_lanes(squares + c, lanes) - sum * (sum * each), T(0));
      const Vec<T> here = (load_lanes(center + c, lanes) - load_lanes(x + c, lanes)) + sum * each, delta = here - old;
      store_lanes(mean + c, fma(delta, splat(part), old), lanes);
      store_lanes(square + c, load_lanes(square + c, lanes) + fma(delta * delta, splat(weight), own), lanes);
    });
    done += count;
  }
}

}  // namespace pvk::PVK_ISA
