// Reductions along wide windows on the CPU: what each window leaves in a register, of many windows at once.
#pragma once

#include <cstdint>
#include <utility>

#include "core/pool_rows.h"
#include "core/simd_pair.h"

namespace pvk::PVK_ISA {

template <typename T, int kFirst, int... kLane>
PVK_INLINE Vec<T> every_second(Vec<T> first, Vec<T> second, std::integer_sequence<int, kLane...>) {
  const Mask<T> order{(2 * kLane + kFirst)...};
  return __builtin_shuffle(first, second, order);
}

// The even, the odd elements of two neighbouring registers.
template <typename T>
PVK_INLINE Vec<T> even_lanes(Vec<T> first, Vec<T> second) {
  return every_second<T, 0>(first, second, std::make_integer_sequence<int, kLanes<T>>{});
}
template <typename T>
PVK_INLINE Vec<T> odd_lanes(Vec<T> first, Vec<T> second) {
  return every_second<T, 1>(first, second, std::make_integer_sequence<int, kLanes<T>>{});
}

// A pair in the order of load_pair() as neighbours.
template <typename scalar_t, typename T>
PVK_INLINE void store_in_order(T* target, const Pair<T>& pair) {
  Vec<T> low = pair.first, high = pair.second;
  if constexpr (kSplitsPairs<scalar_t>) interleave<T>(pair.first, pair.second, low, high);
  store(target, low);
  store(target + kLanes<T>, high);
}

// Which element of a pair in the order of load_pair() each lane of its second (first) register is.
template <typename scalar_t>
PVK_INLINE Mask<opmath_t<scalar_t>> elements_of_pair(bool second) {
  using T = opmath_t<scalar_t>;
  const Mask<T> lane = lane_numbers<T>(std::make_integer_sequence<int, kLanes<T>>{});
  if constexpr (kSplitsPairs<scalar_t>) return 2 * lane + int(second);
  return lane + int(second) * kLanes<T>;
}

}  // namespace pvk::PVK_ISA
