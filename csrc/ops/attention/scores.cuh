// From products to scores, in units (log 2 for 16-bit types, whose exponentials are powers of 2), -infinity where a key
// is masked; and what dropout keeps. Rows of a tile are queries and columns keys, or, where kByKey, the other way
// round.
#pragma once

#include "ops/attention/tiles.cuh"

namespace pvk::attention {

// Of scores: what 1 is.
template <typename scalar_t>
constexpr double kUnits = kIsHalf<scalar_t> ? 1.4426950408889634074 : 1.0;

template <typename T>
PVK_DEVICE T minus_infinity() {
  return -T(__builtin_huge_val());
}

// Keys from here on are masked for every query of the batch.
PVK_DEVICE int64_t keys_end_of(const AttentionParams& p, int64_t b) {
  int64_t end = min_of(p.S, p.L + p.right);
  if (p.key_lengths != nullptr)
    end = min_of(end, int64_t(__ldg(reinterpret_cast<const long long*>(p.key_lengths) + b)));
  return max_of(end, int64_t(0));
}

// Bytes that say which keys are absent of a head, [B or 1, H or 1, S], where there is a bias.
PVK_HOST_DEVICE int64_t absent_bytes(const AttentionParams& p) {
  if (p.bias == nullptr) return 0;
  return (p.bias_stride[0] == 0 ? 1 : p.B) * (p.bias_stride[1] == 0 ? 1 : p.H) * p.S;
}
PVK_DEVICE const uint8_t* absent_of(const AttentionParams& p, const uint8_t* absent, int64_t b, int64_t h) {
  if (p.bias == nullptr) return nullptr;
  const int64_t heads = p.bias_stride[1] == 0 ? 1 : p.H;
  return absent + ((p.bias_stride[0] == 0 ? 0 : b) * heads + (p.bias_stride[1] == 0 ? 0 : h)) * p.S;
}

template <typename scalar_t>
PVK_DEVICE opmath_t<scalar_t> exp_of_units(opmath_t<scalar_t> x) {
  if constexpr (kIsHalf<scalar_t>) {
    return exp2_approx(x);
  } else {
    return exp_of(x);
  }
}

PVK_DEVICE float log_of(float x) {
  return logf(x);
}
PVK_DEVICE double log_of(double x) {
  return log(x);
}

// A block's tile of queries of a head, and the tiles of COLUMNS keys that any of them looks at.
template <int COLUMNS>
struct QueryTile {
  int64_t head, b, h, g, first, keys_end, first_tile, count;

  PVK_DEVICE QueryTile(const AttentionParams& p, int64_t index, int rows) {
    const int64_t tiles = ceil_div(p.L, int64_t(rows));
    head = index / tiles;
    b = head / p.H;
    h = head % p.H;
    g = h / (p.H / p.G);
    first = index % tiles * rows;
    keys_end = keys_end_of(p, b);
    first_tile = max_of(first - p.left, int64_t(0)) / COLUMNS;
    const int64_t end = min_of(keys_end, min_of(first + rows, p.L) + p.right);
    count = max_of(ceil_div(end, int64_t(COLUMNS)) - first_tile, int64_t(0));
  }
};

PVK_DEVICE int64_t warp_number() {
  return threadIdx.x / kWarpSize;
}

// A warp's tile of scores.
template <typename scalar_t, bool kByKey>
struct Place {
  int64_t b, h;
  int64_t row, column;            // the first ones
  int64_t rows_end, columns_end;  // beyond is nothing, or masked

  PVK_DEVICE int64_t before(const AttentionParams& p) const { return kByKey ? p.right : p.left; }
  PVK_DEVICE int64_t after(const AttentionParams& p) const { return kByKey ? p.left : p.right; }

  // Whether every row looks at all COLUMNS.
  template <int COLUMNS>
  PVK_DEVICE bool is_whole(const AttentionParams& p) const {
    const int64_t last_row = row + kWarpRows<scalar_t> - 1, last = column + COLUMNS - 1;
    return last_row < rows_end && last < columns_end && column >= last_row - before(p) && last <= row + after(p);
  }
};

// The columns [low, high) of a tile that a row looks at.
struct Span {
  int low, high;

  template <typename scalar_t, bool kByKey>
  PVK_DEVICE Span(const AttentionParams& p, const Place<scalar_t, kByKey>& place, int row_in_warp, int columns) {
    const int64_t row = place.row + row_in_warp;
    const auto clamped = [&](int64_t column) {
      return int(min_of(max_of(column - place.column, int64_t(0)), int64_t(columns)));
    };
    low = clamped(row - place.before(p));
    high = row < place.rows_end ? clamped(min_of(row + place.after(p) + 1, place.columns_end)) : 0;
  }
};

template <typename scalar_t, typename bias_t>
PVK_DEVICE opmath_t<scalar_t> biased(opmath_t<scalar_t> score, bias_t bias) {
  using T = opmath_t<scalar_t>;
  if constexpr (std::is_same_v<bias_t, uint8_t>) {
    return bias != 0 ? score : minus_infinity<T>();
  } else {
    const T value = T(to_opmath(bias));
    return value == minus_infinity<T>() ? value : fma(value, T(kUnits<scalar_t>), score);
  }
}

template <typename bias_t, typename scalar_t, bool kByKey, int COLUMNS, int RUN>
PVK_DEVICE void add_bias(Fragment<scalar_t, COLUMNS, RUN>& scores, const AttentionParams& p,
                         const Place<scalar_t, kByKey>& place, int lane) {
  using T = opmath_t<scalar_t>;
  const int64_t row_stride = p.bias_stride[kByKey ? 3 : 2], column_stride = p.bias_stride[kByKey ? 2 : 3];
  const bias_t* const bias = static_cast<const bias_t*>(p.bias) + place.b * p.bias_stride[0] +
                             place.h * p.bias_stride[1] + place.row * row_stride + place.column * column_stride;
#pragma unroll
  for (int r = 0; r < scores.kRows; ++r) {
    const Span span(p, place, scores.row(lane, r), COLUMNS);
    const bias_t* const of_row = bias + scores.row(lane, r) * row_stride;
#pragma unroll
    for (int c = 0; c < scores.kCount; ++c) {
      const int column = scores.column(lane, c);
      const bool seen = column >= span.low && column < span.high;
      scores.at(r, c) =
          seen ? biased<scalar_t>(scores.at(r, c), __ldg(of_row + column * column_stride)) : minus_infinity<T>();
    }
  }
}

template <int EXTRAS, typename scalar_t, bool kByKey, int COLUMNS, int RUN>
PVK_DEVICE void finish_scores(Fragment<scalar_t, COLUMNS, RUN>& scores, const AttentionParams& p,
                              const Place<scalar_t, kByKey>& place, int lane) {
  using T = opmath_t<scalar_t>;
  const T scale = T(p.scale * kUnits<scalar_t>);
  scores.for_each([&](int, int, T& score) { score *= scale; });
  if constexpr (EXTRAS >= kBiased) {
    switch (p.bias_kind) {
      case BiasKind::kBool:
        return add_bias<uint8_t>(scores, p, place, lane);
      case BiasKind::kAdded:
        return add_bias<scalar_t>(scores, p, place, lane);
      case BiasKind::kAddedFloat:
        if constexpr (kIsHalf<scalar_t>) add_bias<float>(scores, p, place, lane);
        return;
      case BiasKind::kNone:
        break;
    }
  }
  if (place.template is_whole<COLUMNS>(p)) return;
#pragma unroll
  for (int r = 0; r < scores.kRows; ++r) {
    const Span span(p, place, scores.row(lane, r), COLUMNS);
#pragma unroll
    for (int c = 0; c < scores.kCount; ++c) {
      const int column = scores.column(lane, c);
      if (!(column >= span.low && column < span.high)) scores.at(r, c) = minus_infinity<T>();
    }
  }
}

// A bit of each of the lane's weights, r * kCount + c: whether dropout keeps it.
template <typename Scores, typename scalar_t, bool kByKey>
PVK_DEVICE uint32_t kept_of(const AttentionParams& p, const Place<scalar_t, kByKey>& place, int lane) {
  static_assert(Scores::kRows * Scores::kCount <= 32);
  const uint64_t seed = uint64_t(__ldg(reinterpret_cast<const long long*>(p.seed)));
  const uint32_t threshold = dropout_threshold(p.dropout_p);
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < Scores::kRows * Scores::kCount; ++i) {
    const int64_t row = place.row + Scores::row(lane, i / Scores::kCount);
    const int64_t column = place.column + Scores::column(lane, i % Scores::kCount);
    const uint64_t index = dropout_index(p, place.b, place.h, kByKey ? column : row, kByKey ? row : column);
    uint32_t words[4];
    philox(seed, index / 4, words);
    const uint32_t low = index % 2 == 0 ? words[0] : words[1], high = index % 2 == 0 ? words[2] : words[3];
    kept |= uint32_t((index % 4 < 2 ? low : high) >= threshold) << i;
  }
  return kept;
}

}  // namespace pvk::attention
