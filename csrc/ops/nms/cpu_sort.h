// The order of scores on the CPU: descending, NaN first, ties (-0 and 0 too) by index.
#pragma once

#include "core/buffer.h"
#include "core/radix_sort.h"
#include "core/simd.h"

namespace pvk::nms::PVK_ISA {

using namespace pvk::PVK_ISA;

template <typename T>
struct KeyOf {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

// Keys in ascending order are scores in descending order.
template <typename T>
PVK_INLINE typename KeyOf<T>::type key_of(T score) {
  using Key = typename KeyOf<T>::type;
  constexpr Key kSign = Key(1) << (8 * sizeof(Key) - 1);
  if (score != score) return 0;
  score += T(0);  // -0 becomes 0
  Key bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits & kSign ? bits : ~(bits | kSign);
}

// Scratch of a thread that sorts; `order` is the result.
template <typename T>
struct Order {
  using Key = typename KeyOf<T>::type;
  static constexpr int64_t kFewForInsertion = 48;

  Buffer<Key> keys;
  Buffer<int64_t> order;

  // Scores of which at(index) is one.
  template <typename At>
  void sort(int64_t count, const At& at) {
    keys.reserve(count);
    order.reserve(count);
    if (count <= kFewForInsertion) {
      for (int64_t i = 0; i < count; ++i) {
        const Key key = key_of<T>(at(i));
        int64_t place = i;
        for (; place > 0 && keys[place - 1] > key; --place) {
          keys[place] = keys[place - 1];
          order[place] = order[place - 1];
        }
        keys[place] = key;
        order[place] = i;
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = key_of<T>(at(i));
      order[i] = i;
    }
    radix_sort(keys, order, count);
  }

  // How many of the sorted scores come before -inf.
  int64_t count_present(int64_t count) const {
    const Key absent = key_of<T>(T(-__builtin_inf()));
    while (count > 0 && keys[count - 1] == absent) --count;
    return count;
  }
};

}  // namespace pvk::nms::PVK_ISA
