// Pooling along rows on the CPU: SIMD registers of outputs that lie next to each other.
//
// A row holds W pixels of `group` elements: 1 of a plane, C of a channels_last map with few channels. It is copied to
// phases, the pixels of each residue modulo the stride together and padding around them, so that a tap of a register
// of outputs is one contiguous load, and no edge is left.
#pragma once

#include "core/pool_window.h"
#include "core/simd.h"
#include "core/simd_partial.h"

namespace pvk::PVK_ISA {

inline constexpr int64_t kMostTaps = 32, kMostReach = 64, kMostPhases = 4;

struct RowPlan {
  int64_t group;
  int64_t columns, outputs;  // elements of an input row, of an output row
  int64_t pitch;             // outputs in whole registers
  bool phased;               // else windows are wide or uneven
  int64_t taps, phase_pitch, phase_size;
  int64_t tap_place[kMostTaps];  // where tap 0, 1, ... of output 0 lies
};

// An adaptive axis whose outputs divide its size is a plain one.
PVK_INLINE PoolAxis plain_where_even(const PoolAxis& axis) {
  if (axis.kernel != 0 || axis.outputs == 0 || axis.size % axis.outputs != 0) return axis;
  const int64_t pixels = axis.size / axis.outputs;
  return {axis.size, axis.outputs, pixels, pixels, 0, 1};
}

// Both axes plain where both are even.
PVK_INLINE void make_plain(PoolAxis& rows, PoolAxis& columns) {
  const PoolAxis plain_rows = plain_where_even(rows), plain_columns = plain_where_even(columns);
  if (plain_rows.kernel == 0 || plain_columns.kernel == 0) return;
  rows = plain_rows;
  columns = plain_columns;
}

template <typename T>
RowPlan plan_row(const PoolAxis& rows, const PoolAxis& columns, int64_t group) {
  constexpr int64_t kLane = kLanes<T>;
  RowPlan plan{};
  plan.group = group;
  plan.columns = columns.size * group;
  plan.outputs = columns.outputs * group;
  plan.pitch = ceil_div(plan.outputs, kLane) * kLane;
  const int64_t reach = (columns.kernel - 1) * columns.dilation + 1;
  plan.phased = columns.kernel > 0 && columns.kernel <= kMostTaps && reach <= kMostReach &&
                columns.stride <= (group == 1 ? 2 : kMostPhases) && columns.kernel < columns.size + columns.padding &&
                (rows.kernel - 1) * rows.dilation < kMostReach;
  if (!plan.phased) return plan;
  plan.taps = columns.kernel;
  plan.phase_pitch = ceil_div(plan.pitch + (reach - 1) / columns.stride * group, kLane) * kLane;
  plan.phase_size = plan.phase_pitch * columns.stride;
  for (int64_t k = 0; k < plan.taps; ++k) {
    const int64_t i = k * columns.dilation;
    plan.tap_place[k] = i % columns.stride * plan.phase_pitch + i / columns.stride * group;
  }
  return plan;
}

// The elements at even and at odd places of two neighbouring registers.
template <typename T>
struct DeinterleaveMasks {
  Mask<T> even, odd;
  constexpr DeinterleaveMasks() : even{}, odd{} {
    for (int i = 0; i < kLanes<T>; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
    }
  }
};

template <typename scalar_t, typename T>
PVK_INLINE void load_even_odd(const scalar_t* source, Vec<T>& even, Vec<T>& odd) {
  const Vec<T> first = load(source), second = load(source + kLanes<T>);
  const DeinterleaveMasks<T> masks;
  even = __builtin_shuffle(first, second, masks.even);
  odd = __builtin_shuffle(first, second, masks.odd);
}
template <>
PVK_INLINE void load_even_odd<BFloat16, float>(const BFloat16* source, Vec<float>& even, Vec<float>& odd) {
  load_pair<BFloat16, float>(source, even, odd);
}

// The inverse: first[0], second[0], first[1], second[1], ...
template <typename T>
PVK_INLINE void interleave(Vec<T> first, Vec<T> second, Vec<T>& low, Vec<T>& high) {
  Mask<T> low_mask{}, high_mask{};
  for (int i = 0; i < kLanes<T>; ++i) {
    low_mask[i] = i / 2 + i % 2 * kLanes<T>;
    high_mask[i] = kLanes<T> / 2 + i / 2 + i % 2 * kLanes<T>;
  }
  low = __builtin_shuffle(first, second, low_mask);
  high = __builtin_shuffle(first, second, high_mask);
}

// One row of the map to the phases; what is padding there stays as it is.
template <typename scalar_t, typename T>
PVK_INLINE void copy_to_phases(const RowPlan& plan, const PoolAxis& columns, const scalar_t* row, T* phases) {
  const int64_t G = plan.group, stride = columns.stride, padding = columns.padding;
  const int64_t needed = (columns.outputs - 1) * stride + (columns.kernel - 1) * columns.dilation + 1;
  const int64_t count = min_of(columns.size, needed - padding);
  if (stride == 1) {
    T* const to = phases + padding * G;
    int64_t i = 0;
    for (; i + kLanes<T> <= count * G; i += kLanes<T>) store(to + i, load(row + i));
    for (; i < count * G; ++i) to[i] = T(to_float(row[i]));
    return;
  }
  if (stride == 2 && G == 1) {
    T* const even = phases + (padding & 1) * plan.phase_pitch + padding / 2;
    T* const odd = phases + ((padding + 1) & 1) * plan.phase_pitch + (padding + 1) / 2;
    int64_t i = 0;
    for (; i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>) {
      Vec<T> first, second;
      load_even_odd<scalar_t, T>(row + i, first, second);
      store(even + i / 2, first);
      store(odd + i / 2, second);
    }
    for (; i + 1 < count; i += 2) {
      even[i / 2] = T(to_float(row[i]));
      odd[i / 2] = T(to_float(row[i + 1]));
    }
    if (i < count) even[i / 2] = T(to_float(row[i]));
    return;
  }
  for (int64_t residue = 0; residue < min_of(stride, count); ++residue) {
    const int64_t place = padding + residue;
    T* to = phases + place % stride * plan.phase_pitch + place / stride * G;
    for (int64_t x = residue; x < count; x += stride, to += G)
      for (int64_t c = 0; c < G; ++c) to[c] = T(to_float(row[x * G + c]));
  }
}

template <typename T>
PVK_INLINE void fill(T* target, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) target[i] = value;
}

template <typename scalar_t>
PVK_INLINE Vec<opmath_t<scalar_t>> load_some(const scalar_t* source, int64_t count) {
  return count >= kLanes<opmath_t<scalar_t>> ? load(source) : load_first(source, count);
}

template <typename scalar_t>
PVK_INLINE void store_some(scalar_t* target, Vec<opmath_t<scalar_t>> value, int64_t count) {
  if (count >= kLanes<opmath_t<scalar_t>>) {
    store(target, value);
  } else {
    store_first(target, value, count);
  }
}

PVK_INLINE bool covers_the_map(const PoolAxis& axis) {
  if (axis.outputs != 1 || axis.padding != 0) return false;
  return axis.kernel == 0 || (axis.kernel == axis.size && axis.dilation == 1);
}

}  // namespace pvk::PVK_ISA
