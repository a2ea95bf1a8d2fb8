// Pairs of registers of neighbours, in the order of load_pair() (simd.h): whole, or the first elements alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/simd.h"
#include "core/simd_partial.h"
#include "core/stream.h"

namespace pvk::PVK_ISA {

template <typename scalar_t>
inline constexpr int kPair = 2 * kLanes<opmath_t<scalar_t>>;  // elements

// Whether a pair holds elements of even numbers, and then those of odd numbers.
template <typename scalar_t>
inline constexpr bool kSplitsPairs = false;
template <>
inline constexpr bool kSplitsPairs<BFloat16> = true;

// Where an element of a row lies in the row's pairs.
template <typename scalar_t>
PVK_INLINE int64_t place_in_pairs(int64_t i) {
  if constexpr (!kSplitsPairs<scalar_t>) return i;
  const int64_t in_pair = i % kPair<scalar_t>;
  return i - in_pair + in_pair % 2 * (kPair<scalar_t> / 2) + in_pair / 2;
}

template <typename T>
struct Pair {
  Vec<T> first, second;

  PVK_INLINE Pair() : first{}, second{} {}
  PVK_INLINE Pair(Vec<T> first, Vec<T> second) : first(first), second(second) {}
  PVK_INLINE explicit Pair(T value) : first(splat(value)), second(splat(value)) {}

  PVK_INLINE Pair operator+(const Pair& other) const { return {first + other.first, second + other.second}; }
  PVK_INLINE Pair operator-(const Pair& other) const { return {first - other.first, second - other.second}; }
  PVK_INLINE Pair operator*(const Pair& other) const { return {first * other.first, second * other.second}; }
};

template <typename T>
PVK_INLINE Pair<T> fma(const Pair<T>& a, const Pair<T>& b, const Pair<T>& c) {
  return {fma(a.first, b.first, c.first), fma(a.second, b.second, c.second)};
}

template <typename T, int... kLane>
PVK_INLINE Mask<T> lane_numbers(std::integer_sequence<int, kLane...>) {
  return Mask<T>{kLane...};
}

// The value in the first `count` lanes, zeros in the others.
template <typename T>
PVK_INLINE Vec<T> keep_first(Vec<T> value, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_mov_ps(__mmask16((1u << count) - 1), (__m512)value);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_mov_pd(__mmask8((1u << count) - 1), (__m512d)value);
#endif
  const Mask<T> lane = lane_numbers<T>(std::make_integer_sequence<int, kLanes<T>>{});
  return lane < Mask<T>{} + decltype(lane[0] + 0)(count) ? value : Vec<T>{};
}

// Elements of the first and of the second register among the first `count` of a pair.
template <typename scalar_t>
PVK_INLINE int64_t count_of_first(int64_t count) {
  constexpr int kSide = kPair<scalar_t> / 2;
  if constexpr (kSplitsPairs<scalar_t>) return (count + 1) / 2;
  return count < kSide ? count : kSide;
}

// The pair with zeros where an element is not among the first `count`.
template <typename scalar_t, typename T>
PVK_INLINE Pair<T> keep_first(const Pair<T>& pair, int64_t count) {
  if (count == kPair<scalar_t>) return pair;
  const int64_t first = count_of_first<scalar_t>(count);
  return {keep_first<T>(pair.first, first), keep_first<T>(pair.second, count - first)};
}

// Both rounded to nearest even, those of `odd` in the high halves of the lanes; NaN stays NaN.
PVK_INLINE VecU32 round_pair_to_bfloat16(Vec<float> even, Vec<float> odd) {
#if defined(__AVX512F__)
  const VecU32 low = (VecU32)even, high = (VecU32)odd;
  const VecU32 rounded_low = (low + 0x7fff + ((low >> 16) & 1)) >> 16;
  const VecU32 rounded_high = high + 0x7fff + ((high >> 16) & 1);
  if (_mm512_cmp_ps_mask((__m512)even, (__m512)odd, _CMP_UNORD_Q) == 0) [[likely]]
    return (VecU32)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)rounded_low, (__m512i)rounded_high);
#endif
  return round_to_bfloat16(even) | (round_to_bfloat16(odd) << 16);
}

// The first `count` of a pair's elements; zeros in the place of the others.
template <typename scalar_t>
PVK_INLINE Pair<opmath_t<scalar_t>> load_elements(const scalar_t* source, int64_t count) {
  using T = opmath_t<scalar_t>;
  Pair<T> pair;
  if (count == kPair<scalar_t>) {
    load_pair<scalar_t, T>(source, pair.first, pair.second);
  } else if constexpr (kSplitsPairs<scalar_t>) {
    VecU32 raw;
#if defined(__AVX512F__)
    raw = (VecU32)_mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), source);
#else
    scalar_t part[kPair<scalar_t>] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = source[i];
    std::memcpy(&raw, part, sizeof(raw));
#endif
    pair.first = (Vec<T>)(raw << 16);
    pair.second = (Vec<T>)(raw & 0xffff0000u);
  } else {
    const int64_t first = count_of_first<scalar_t>(count);
    pair.first = load_first(source, first);
    if (count > first) pair.second = load_first(source + first, count - first);
  }
  return pair;
}

template <typename scalar_t>
PVK_INLINE void store_elements(scalar_t* target, const Pair<opmath_t<scalar_t>>& pair, int64_t count) {
  using T = opmath_t<scalar_t>;
  if constexpr (kSplitsPairs<scalar_t>) {
    const VecU32 raw = round_pair_to_bfloat16(pair.first, pair.second);
    if (count == kPair<scalar_t>) {
      std::memcpy(target, &raw, sizeof(raw));
      return;
    }
#if defined(__AVX512F__)
    _mm512_mask_storeu_epi16(target, __mmask32((1u << count) - 1), (__m512i)raw);
#else
    scalar_t part[kPair<scalar_t>];
    std::memcpy(part, &raw, sizeof(raw));
    for (int64_t i = 0; i < count; ++i) target[i] = part[i];
#endif
  } else if (count == kPair<scalar_t>) {
    store_pair<scalar_t, T>(target, pair.first, pair.second);
  } else {
    const int64_t first = count_of_first<scalar_t>(count);
    store_first(target, pair.first, first);
    if (count > first) store_first(target + first, pair.second, count - first);
  }
}

// Past the caches; the target is a whole number of cache lines, and begins with one.
template <typename scalar_t>
PVK_INLINE void stream_elements(scalar_t* target, const Pair<opmath_t<scalar_t>>& pair) {
#if defined(__AVX512F__)
  if constexpr (kSplitsPairs<scalar_t>) {
    const VecU32 raw = round_pair_to_bfloat16(pair.first, pair.second);
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), (__m512i)raw);
  }
  if constexpr (sizeof(scalar_t) == 2) {
    const __m512i low = _mm512_zextsi256_si512(narrow(pair.first, scalar_t()));
    const __m512i both = _mm512_inserti64x4(low, narrow(pair.second, scalar_t()), 1);
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), both);
  }
#endif
  stream(target, pair.first);
  stream(target + kPair<scalar_t> / 2, pair.second);
}

// body(offset, elements) for the pairs of a row; of fewer elements at its end.
template <typename scalar_t, typename Body>
PVK_INLINE void for_pairs(int64_t count, const Body& body) {
  constexpr int64_t kWhole = kPair<scalar_t>;
  int64_t i = 0;
  for (; i + kWhole <= count; i += kWhole) body(i, kWhole);
  if (i < count) body(i, count - i);
}

// The same of a row that is written to `target`: body(offset, elements, streamed). Where `past` is set, whole cache
// lines are to be streamed, and the row begins with fewer elements where it does not begin with a line.
template <typename scalar_t, typename Body>
PVK_INLINE void for_pairs_of_target(const scalar_t* target, int64_t count, bool past, const Body& body) {
  constexpr int64_t kWhole = kPair<scalar_t>;
  constexpr uintptr_t kLine = 64;
  if (!past) {
    for_pairs<scalar_t>(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) { body(i, n, false); });
    return;
  }
  int64_t i = int64_t(-reinterpret_cast<uintptr_t>(target) % kLine / sizeof(scalar_t));
  if (i > count) i = count;
  if (i > 0) body(0, i, false);
  for (; i + kWhole <= count; i += kWhole) body(i, kWhole, true);
  if (i < count) body(i, count - i, false);
}

}  // namespace pvk::PVK_ISA
