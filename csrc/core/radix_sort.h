// Stable sort of 64-bit keys with their values: least significant byte first, skipping bytes that all keys share.
#pragma once

#include <cstdint>

#include "core/buffer.h"

namespace pvk::PVK_ISA {

inline void radix_sort(Buffer<uint64_t>& keys, Buffer<int64_t>& values, int64_t count) {
  Buffer<uint64_t> keys_out(count);
  Buffer<int64_t> values_out(count);
  uint64_t *key_from = keys.data(), *key_to = keys_out.data();
  int64_t *value_from = values.data(), *value_to = values_out.data();
  for (int shift = 0; shift < 64; shift += 8) {
    int64_t starts[257] = {};
    for (int64_t i = 0; i < count; ++i) ++starts[((key_from[i] >> shift) & 255) + 1];
    bool shared = false;
    for (int digit = 0; digit < 256; ++digit) shared |= starts[digit + 1] == count;
    if (shared) continue;
    for (int digit = 0; digit < 256; ++digit) starts[digit + 1] += starts[digit];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = starts[(key_from[i] >> shift) & 255]++;
      key_to[place] = key_from[i];
      value_to[place] = value_from[i];
    }
    uint64_t* key_swap = key_from;
    key_from = key_to;
    key_to = key_swap;
    int64_t* value_swap = value_from;
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
