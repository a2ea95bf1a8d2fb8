// Mean and sum of squared differences of rows that stay in the cache, on the CPU.
//
// Twice over the row: the first pass finds the mean of the differences to the first element, so that constants give
// them exactly and a large mean costs no digits; the second what the mean still misses, and the squares. The first
// scales each term, so that only a mean that is too large itself overflows.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/simd.h"
#include "core/simd_partial.h"

namespace pvk::PVK_ISA {

// In each lane the one whose number differs in the bit. The order is a constant by construction: one that a loop fills,
// the compiler builds lane by lane.
template <typename T, int Bit, int... kLane>
PVK_INLINE Vec<T> lanes_apart(Vec<T> value, std::integer_sequence<int, kLane...>) {
  const Mask<T> order{(kLane ^ Bit)...};
  return __builtin_shuffle(value, order);
}

// The sum over the lanes, as a tree.
template <typename T, int Bit = kLanes<T> / 2>
PVK_INLINE T sum_of_lanes(Vec<T> value) {
  if constexpr (Bit == 0) return value[0];
  if constexpr (Bit > 0) {
    value += lanes_apart<T, Bit>(value, std::make_integer_sequence<int, kLanes<T>>{});
    return sum_of_lanes<T, Bit / 2>(value);
  }
}

// Sums of registers in double: what the sums of a few registers in T are added to, lest long chains round.
template <typename T>
struct WideSum {
  Vec<double> low{}, high{};

  PVK_INLINE void add(Vec<T> value) {
    if constexpr (sizeof(T) == 8) {
      low += value;
    } else {
      typedef float Half __attribute__((vector_size(kRegisterBytes / 2)));
      Half half[2];
      std::memcpy(half, &value, sizeof(half));
      low += __builtin_convertvector(half[0], Vec<double>);
      high += __builtin_convertvector(half[1], Vec<double>);
    }
  }
  PVK_INLINE double value() const { return sum_of_lanes<double>(low + high); }
};

template <typename T>
struct Moments {
  T mean, square;  // square: the sum of (x - mean)^2
  double exact_mean;

  // 1 / sqrt(variance + eps) of `count` elements.
  PVK_INLINE T reciprocal_deviation(int64_t count, double eps) const {
    const T variance = square / T(count) + T(eps);
    if constexpr (sizeof(T) == 8) return T(1) / __builtin_sqrt(variance);
    return T(1) / __builtin_sqrtf(variance);
  }
};

// body(offset, lanes, accumulator 0 to 3) for the registers of a row; the last may have fewer lanes.
template <typename T, typename Body>
PVK_INLINE void for_row(int64_t count, const Body& body) {
  constexpr int kSide = kLanes<T>;
  int64_t i = 0;
  for (; i + 4 * kSide <= count; i += 4 * kSide) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) body(i + v * kSide, kSide, v);
  }
  for (; i + kSide <= count; i += kSide) body(i, kSide, 0);
  if (i < count) body(i, int(count - i), 1);
}

template <typename scalar_t>
PVK_INLINE Vec<opmath_t<scalar_t>> load_lanes(const scalar_t* source, int lanes) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {  // one instruction, where load() is compiled to halves
    if (lanes == kLanes<float>) return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)), BFloat16());
  }
#endif
  return lanes == kLanes<opmath_t<scalar_t>> ? load(source) : load_first(source, lanes);
}

template <typename scalar_t>
PVK_INLINE void store_lanes(scalar_t* target, Vec<opmath_t<scalar_t>> value, int lanes) {
  if (lanes == kLanes<opmath_t<scalar_t>>) return store(target, value);
  store_first(target, value, lanes);
}

// x - center in the first lanes, zeros in the others.
template <typename T>
PVK_INLINE Vec<T> difference(Vec<T> x, T center, int lanes) {
  const Vec<T> result = x - center;
  return lanes == kLanes<T> ? result : first_lanes<T>(lanes) ? result : Vec<T>{};
}

// Of `count` > 0 neighbours.
template <typename scalar_t>
PVK_INLINE Moments<opmath_t<scalar_t>> moments_of_row(const scalar_t* row, int64_t count) {
  using T = opmath_t<scalar_t>;
  const T first = to_float(row[0]), share = T(1) / T(count);
  Vec<T> sum[4] = {}, square[4] = {};
  for_row<T>(count, [&](int64_t i, int lanes, int v) __attribute__((always_inline)) {
    sum[v] = fma(difference(load_lanes(row + i, lanes), first, lanes), splat(share), sum[v]);
  });
  const T center = first + sum_of_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (int v = 0; v < 4; ++v) sum[v] = Vec<T>{};
  for_row<T>(count, [&](int64_t i, int lanes, int v) __attribute__((always_inline)) {
    const Vec<T> x = difference(load_lanes(row + i, lanes), center, lanes);
    sum[v] += x;
    square[v] = fma(x, x, square[v]);
  });
  const T missed = sum_of_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  const T squares = sum_of_lanes<T>((square[0] + square[1]) + (square[2] + square[3])) - missed * (missed * share);
  const T rest = missed * share;
  return {center + rest, squares < T(0) ? T(0) : squares, double(center) + double(rest)};
}

}  // namespace pvk::PVK_ISA
