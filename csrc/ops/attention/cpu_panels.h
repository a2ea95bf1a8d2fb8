// Between rows in memory and what the products read: panels, and rows in the computing type.
//
// `skipped` marks rows that count as zeros whatever they hold; null: none.
#pragma once

#include <cstdint>

#include "core/transpose.h"
#include "ops/attention/cpu_product.h"

namespace pvk::attention::PVK_ISA {

// Rows of a tensor, a head's.
template <typename scalar_t>
struct Rows {
  scalar_t* data;
  int64_t stride;

  PVK_INLINE scalar_t* at(int64_t row) const { return data + row * stride; }
};

template <typename scalar_t, typename T>
PVK_INLINE Vec<T> load_at_most(const scalar_t* source, int64_t count) {
  return count >= kLanes<T> ? Vec<T>(load(source)) : Vec<T>(load_first(source, count));
}

template <typename scalar_t, typename T>
PVK_INLINE void store_at_most(scalar_t* target, Vec<T> value, int64_t count) {
  if (count >= kLanes<T>) return store(target, value);
  store_first(target, value, count);
}

// Elements of a panel that belong together: one, converted; or, of bfloat16, a pair along depth in the bits of a float.
template <typename In, typename scalar_t>
PVK_INLINE Vec<opmath_t<In>> load_units(const scalar_t* source, int64_t count) {
  using T = opmath_t<In>;
#if defined(__AVX512F__)
  if constexpr (kPairs<In>) {
    if (count >= 2 * kLanes<T>) return (Vec<T>)_mm512_loadu_si512(source);
    return (Vec<T>)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), source);
  }
#endif
  return load_at_most<scalar_t, T>(source, count);
}

// Panels of rows [first, first + panels.outputs), a lane each: panel[k][lane] = row lane's element k.
template <typename In, typename scalar_t>
void pack_transposed(In* target, const Panels<opmath_t<In>>& panels, Rows<const scalar_t> rows, int64_t depth,
                     const bool* skipped) {
  using T = opmath_t<In>;
  constexpr int kSide = kLanes<T>, kUnit = kPairs<In> ? 2 : 1;
  const int64_t units = ceil_div<int64_t>(depth, kUnit);
  T* to = reinterpret_cast<T*>(target);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.vectors_of(panel) * kSide;
    for (int64_t lane = 0; lane < width; lane += kSide) {
      const int64_t first = panels.first_output(panel) + lane;
      for (int64_t unit = 0; unit < units; unit += kSide) {
        Vec<T> square[kSide];
        if (skipped == nullptr && first + kSide <= panels.outputs && (unit + kSide) * kUnit <= depth) {
          const scalar_t* const from = rows.at(first) + unit * kUnit;
#pragma GCC unroll 16
          for (int i = 0; i < kSide; ++i) square[i] = load_units<In>(from + i * rows.stride, kUnit * kSide);
          transpose_square<T>(square);
#pragma GCC unroll 16
          for (int i = 0; i < kSide; ++i) store(to + (unit + i) * width + lane, square[i]);
          continue;
        }
#pragma GCC unroll 1
        for (int i = 0; i < kSide; ++i) {
          const int64_t row = first + i;
          const bool is_zero = row >= panels.outputs || (skipped != nullptr && skipped[row]);
          square[i] = is_zero ? Vec<T>{} : load_units<In>(rows.at(row) + unit * kUnit, depth - unit * kUnit);
        }
        transpose_square<T>(square);
        const int count = int(min_of<int64_t>(units - unit, kSide));
        for (int i = 0; i < count; ++i) store(to + (unit + i) * width + lane, square[i]);
      }
    }
    to += units * width;
  }
}

// A register of a panel of rows as they are: columns of row k; of bfloat16 of the rows k and k + 1, paired.
template <typename In, typename scalar_t>
PVK_INLINE Vec<opmath_t<In>> load_step(Rows<const scalar_t> rows, int64_t k, int64_t depth, int64_t column,
                                       int64_t columns, const bool* skipped) {
  using T = opmath_t<In>;
  const auto one = [&](int64_t row) __attribute__((always_inline)) {
    const bool is_zero = row >= depth || (skipped != nullptr && skipped[row]);
    return is_zero ? Vec<T>{} : load_at_most<scalar_t, T>(rows.at(row) + column, columns - column);
  };
  if constexpr (kPairs<In>) {
    return (Vec<T>)(((VecU32)one(k) >> 16) | (VecU32)one(k + 1));
  } else {
    return one(k);
  }
}

// Panels of the columns of `depth` rows.
template <typename In, typename scalar_t>
void pack_rows(In* target, const Panels<opmath_t<In>>& panels, Rows<const scalar_t> rows, int64_t depth,
               const bool* skipped) {
  using T = opmath_t<In>;
  T* to = reinterpret_cast<T*>(target);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int vectors = panels.vectors_of(panel);
    const int64_t first = panels.first_output(panel);
    const int whole = int(panels.outputs_of(panel) / kLanes<T>);
    if (!kPairs<In> && skipped == nullptr) {
      for (int64_t k = 0; k < depth; ++k, to += vectors * kLanes<T>) {
        const scalar_t* const from = rows.at(k) + first;
        for (int v = 0; v < whole; ++v) store(to + v * kLanes<T>, Vec<T>(load(from + v * kLanes<T>)));
        if (whole < vectors)
          store(to + whole * kLanes<T>, load_first(from + whole * kLanes<T>, panels.outputs_of(panel) % kLanes<T>));
      }
      continue;
    }
    for (int64_t k = 0; k < depth; k += kPairs<In> ? 2 : 1)
      for (int v = 0; v < vectors; ++v, to += kLanes<T>)
        store(to, load_step<In>(rows, k, depth, first + v * kLanes<T>, panels.outputs, skipped));
  }
}

// Where panel `panel` of `depth` begins.
template <typename In>
int64_t panel_offset(const Panels<opmath_t<In>>& panels, int64_t panel, int64_t depth) {
  return panels.first_output(panel) * padded_depth<In>(depth);
}

// Rows as the left side of a product: as they are where their type is that, else converted into the buffer.
template <typename In, typename scalar_t>
Rows<const In> left_rows(Rows<const scalar_t> rows, int64_t count, int64_t columns, In* buffer) {
  using T = opmath_t<In>;
  if constexpr (sizeof(In) == sizeof(scalar_t)) {
    return {reinterpret_cast<const In*>(rows.data), rows.stride};
  } else {
    const int64_t pitch = ceil_div<int64_t>(columns, kLanes<T>) * kLanes<T>;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < columns; c += kLanes<T>)
        store(buffer + i * pitch + c, load_at_most<scalar_t, T>(rows.at(i) + c, columns - c));
    return {buffer, pitch};
  }
}

// Whether every element is finite.
template <typename scalar_t>
bool all_finite(Rows<const scalar_t> rows, int64_t count, int64_t columns) {
  using T = opmath_t<scalar_t>;
  Vec<T> sum{};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < columns; c += kLanes<T>)
      sum = fma(load_at_most<scalar_t, T>(rows.at(i) + c, columns - c), Vec<T>{}, sum);
  return !any<T>(sum != Vec<T>{});
}

// target[:] = source[:] * factor, converted.
template <typename scalar_t, typename T>
PVK_INLINE void store_row(scalar_t* target, const T* source, int64_t columns, T factor) {
  for (int64_t c = 0; c < columns; c += kLanes<T>)
    store_at_most<scalar_t, T>(target + c, load(source + c) * factor, columns - c);
}

template <typename scalar_t>
void zero_rows(Rows<scalar_t> rows, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t i = begin; i < end; ++i) std::memset(rows.at(i), 0, uint64_t(columns) * sizeof(scalar_t));
}

// Rows of T to bfloat16: [rows][pitch], and pairs of rows [rows / 2][pitch][2], a zero where the last has none.
#if defined(__AVX512F__)
void narrow_rows(BFloat16* target, const float* source, int64_t rows, int64_t pitch, int64_t begin, int64_t end);
void narrow_pairs(BFloat16* target, const float* source, int64_t rows, int64_t pitch, int64_t begin, int64_t end);
#endif

}  // namespace pvk::attention::PVK_ISA
