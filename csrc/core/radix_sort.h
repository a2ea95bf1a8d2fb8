// Stable sort of unsigned keys with their values: least significant byte first, skipping bytes that all keys share.
#pragma once

#include <cstdint>

#include "core/buffer.h"

namespace pvk::PVK_ISA {

template <typename Key>
void radix_sort(Buffer<Key>& keys, Buffer<int64_t>& values, int64_t count) {
  constexpr int kDigits = sizeof(Key);
  Buffer<Key> keys_out(count);
  Buffer<int64_t> values_out(count);
  int64_t starts[kDigits][256] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int digit = 0; digit < kDigits; ++digit) ++starts[digit][(keys[i] >> (8 * digit)) & 255];
  Key *key_from = keys.data(), *key_to = keys_out.data();
  int64_t *value_from = values.data(), *value_to = values_out.data();
  for (int digit = 0; digit < kDigits; ++digit) {
    int64_t* const start = starts[digit];
    bool shared = false;
    for (int64_t i = 0, before = 0; i < 256; ++i) {
      const int64_t here = start[i];
      shared |= here == count;
      start[i] = before;
      before += here;
    }
    if (shared) continue;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = start[(key_from[i] >> (8 * digit)) & 255]++;
      key_to[place] = key_from[i];
      value_to[place] = value_from[i];
    }
    Key* const key_swap = key_from;
    key_from = key_to;
    key_to = key_swap;
    int64_t* const value_swap = value_from;
    value_from = value_to;
    value_to = value_swap;
  }
  if (key_from != keys.data()) {
    for (int64_t i = 0; i < count; ++i) {
      keys[i] = key_from[i];
      values[i] = value_from[i];
    }
  }
}

}  // namespace pvk::PVK_ISA
