// Scores of a row of queries: which keys it looks at, bias, exponentials, dropout.
#pragma once

#include <cstdint>
#include <utility>

#include "core/buffer.h"
#include "core/moments.h"
#include "core/simd_math.h"
#include "ops/attention/attention.h"
#include "ops/attention/cpu_panels.h"

namespace pvk::attention::PVK_ISA {

template <typename T>
inline constexpr T kInfinity = T(__builtin_inf());

struct KeyRange {
  int64_t begin, end;

  bool is_empty() const { return begin >= end; }
};

// Keys of a batch but for those at the end that no query looks at.
inline int64_t keys_of(const AttentionParams& p, int64_t b) {
  int64_t keys = min_of(p.S, p.L + p.right);
  if (p.key_lengths != nullptr) keys = max_of<int64_t>(0, min_of(keys, p.key_lengths[b]));
  return keys;
}

// Of these, the ones in the windows of the queries [first, last].
inline KeyRange window_of(const AttentionParams& p, int64_t keys, int64_t first, int64_t last) {
  return {max_of<int64_t>(0, first - p.left), min_of(keys, last + p.right + 1)};
}

// Whether a query may look at fewer keys than a bias lets it.
inline bool has_limits(const AttentionParams& p) {
  return p.key_lengths != nullptr || p.left < p.L - 1 || p.right < p.S - 1;
}

// Rows of the bias in the computing type; bits become 0 and -infinity.
template <typename scalar_t>
class BiasRows {
 public:
  using T = opmath_t<scalar_t>;

  explicit BiasRows(const AttentionParams& p) : p_(p) {
    if (p.bias != nullptr) buffer_.reserve(p.S);
  }

  bool is_given() const { return p_.bias != nullptr; }

  // [S], of which the keys of the range are valid; until the next call.
  const T* row(int64_t b, int64_t h, int64_t i, KeyRange range) {
    const int64_t offset = b * p_.bias_stride[0] + h * p_.bias_stride[1] + i * p_.bias_stride[2];
    switch (p_.bias_kind) {
      case BiasKind::kNone:
        break;
      case BiasKind::kBool: {
        const uint8_t* const from = static_cast<const uint8_t*>(p_.bias) + offset;
        const int64_t step = p_.bias_stride[3];
        for (int64_t j = range.begin; j < range.end; ++j) buffer_[j] = from[j * step] ? T(0) : -kInfinity<T>;
        break;
      }
      case BiasKind::kAdded:
        return converted(static_cast<const scalar_t*>(p_.bias) + offset, range);
      case BiasKind::kAddedFloat:
        if constexpr (sizeof(T) == sizeof(float)) return converted(static_cast<const float*>(p_.bias) + offset, range);
    }
    return buffer_.data();
  }

 private:
  template <typename bias_t>
  const T* converted(const bias_t* from, KeyRange range) {
    const int64_t step = p_.bias_stride[3];
    if (step == 1) {
      if constexpr (sizeof(bias_t) == sizeof(T)) return from;
      for (int64_t j = range.begin; j < range.end; j += kLanes<T>)
        store_at_most<T, T>(buffer_.data() + j, load_at_most<bias_t, T>(from + j, range.end - j), range.end - j);
    } else {
      for (int64_t j = range.begin; j < range.end; ++j) buffer_[j] = T(to_float(from[j * step]));
    }
    return buffer_.data();
  }

  const AttentionParams& p_;
  Buffer<T> buffer_;
};

// absent[j]: whether every query of a head masks the key j.
template <typename scalar_t>
void find_absent(const AttentionParams& p, BiasRows<scalar_t>& bias, int64_t b, int64_t h, int64_t keys, bool* absent) {
  for (int64_t j = 0; j < keys; ++j) absent[j] = true;
  for (int64_t i = 0; i < p.L; ++i) {
    const KeyRange range = window_of(p, keys, i, i);
    const auto* const row = bias.row(b, h, i, range);
    for (int64_t j = range.begin; j < range.end; ++j) absent[j] = absent[j] && row[j] == -kInfinity<float>;
  }
}

// The larger; not of NaN, which the sum of exponentials keeps.
template <typename T>
PVK_INLINE Vec<T> larger_of(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_max_ps(__mmask16(-1), (__m512)b, (__m512)a);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)b, (__m512d)a);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)b, (__m256)a);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_max_pd((__m256d)b, (__m256d)a);
#endif
  return a < b ? b : a;
}

template <typename T, int Bit = kLanes<T> / 2>
PVK_INLINE T largest_of_lanes(Vec<T> value) {
  if constexpr (Bit == 0) return value[0];
  if constexpr (Bit > 0) {
    value = larger_of<T>(value, lanes_apart<T, Bit>(value, std::make_integer_sequence<int, kLanes<T>>{}));
    return largest_of_lanes<T, Bit / 2>(value);
  }
}

// exp(x) for x up to about 0, as exp_of() makes it; 0 below kWeightLow, where it is 1e-37 (double: 1e-307) and less.
template <typename T>
inline constexpr T kWeightLow = sizeof(T) == 4 ? T(-86) : T(-706);

template <typename T>
PVK_INLINE Vec<T> weight_of(Vec<T> x) {
  using C = MathConstants<T>;
  const Vec<T> shifted = fma(x, splat(T(1.4426950408889634)), splat(C::kRounder));
  const Vec<T> whole = shifted - C::kRounder;
  Vec<T> r = fma(whole, splat(-C::kLn2High), x);
  r = fma(whole, splat(-C::kLn2Low), r);
  const Vec<T> power = fma(r * r, polynomial(C::kExp, r), r) + T(1);
  const Vec<T> result = (Vec<T>)((Mask<T>)power + ((Mask<T>)shifted << C::kMantissa));
  const Mask<T> is_small = x < splat(kWeightLow<T>);
  return (Vec<T>)((Mask<T>)(x == x ? result : x) & ~is_small);
}

// A row's scores in the columns [begin, end); `bias` is that of column 0, or null. Columns are whole registers from
// `first` to `last`, which hold those.
template <typename T>
struct ScoreRow {
  T* scores;
  const T* bias;
  T scale;
  int64_t begin, end, first, last;

  PVK_INLINE ScoreRow(T* scores, const T* bias, T scale, int64_t begin, int64_t end)
      : scores(scores), bias(bias), scale(scale), begin(begin), end(end) {
    first = begin / kLanes<T> * kLanes<T>;
    last = begin < end ? ceil_div<int64_t>(end, kLanes<T>) * kLanes<T> : first;
  }

  // body(column, scale * product + bias), -infinity where the key is masked.
  template <typename Body>
  PVK_INLINE void each(const Body& body) const {
    if (bias == nullptr) return each_of<false>(body);
    each_of<true>(body);
  }

  // The largest score before it is scaled, masked ones having become -infinity. Without a bias.
  PVK_INLINE T largest_unscaled() const {
    Vec<T> most = splat(-kInfinity<T>);
    for (int64_t c = first; c < last; c += kLanes<T>) {
      Vec<T> x = load(scores + c);
      if (c < begin || c + kLanes<T> > end) {
        x = first_lanes<T>(end - c) ? x : splat(-kInfinity<T>);
        x = first_lanes<T>(begin - c) ? splat(-kInfinity<T>) : x;
        store(scores + c, x);
      }
      most = larger_of<T>(most, x);
    }
    return largest_of_lanes<T>(most);
  }

  // Of the other registers of [0, width).
  template <typename Body>
  PVK_INLINE void each_outside(int64_t width, const Body& body) const {
    for (int64_t c = 0; c < first; c += kLanes<T>) body(c);
    for (int64_t c = last; c < width; c += kLanes<T>) body(c);
  }

 private:
  template <bool kBias, typename Body>
  PVK_INLINE void each_of(const Body& body) const {
    const Vec<T> nothing = splat(-kInfinity<T>);
    for (int64_t c = first; c < last; c += kLanes<T>) {
      Vec<T> x = load(scores + c);
      if constexpr (kBias) {
        const Vec<T> added = load_at_most<T, T>(bias + c, end - c);
        x = fma(x, splat(scale), added);
        x = added == nothing ? nothing : x;
      } else {
        x = x * scale;
      }
      if (c < begin || c + kLanes<T> > end) {
        x = first_lanes<T>(end - c) ? x : nothing;
        x = first_lanes<T>(begin - c) ? nothing : x;
      }
      body(c, x);
    }
  }
};

// Dropout: which weights of a row are kept.
class Dropout {
 public:
  explicit Dropout(const AttentionParams& p)
      : p_(p), seed_(p.seed == nullptr ? 0 : uint64_t(*p.seed)), threshold_(dropout_threshold(p.dropout_p)) {}

  bool is_given() const { return p_.dropout_p > 0; }

  // row[j - begin] *= 1 / (1 - p) or 0.
  template <typename T>
  void apply(T* row, int64_t b, int64_t h, int64_t i, int64_t begin, int64_t end) const {
    const T factor = T(1 / (1 - p_.dropout_p));
    const uint64_t index = dropout_index(p_, b, h, i, 0);
    uint64_t counter = ~uint64_t(0);
    uint32_t words[4] = {};
    for (int64_t j = begin; j < end; ++j) {
      const uint64_t at = index + uint64_t(j);
      if (at / 4 != counter) philox(seed_, counter = at / 4, words);
      row[j - begin] *= words[at % 4] >= threshold_ ? factor : T(0);
    }
  }

 private:
  const AttentionParams& p_;
  uint64_t seed_;
  uint32_t threshold_;
};

}  // namespace pvk::attention::PVK_ISA
