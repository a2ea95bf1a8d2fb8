// Philox4x32-10: random bits by a counter, the same on every device. Salmon et al., Parallel Random Numbers: As Easy as
// 1, 2, 3, 2011.
#pragma once

#include <cstdint>

#include "core/math.h"

namespace pvk {

// Four words of the stream of a seed, at a counter.
PVK_HOST_DEVICE void philox(uint64_t seed, uint64_t counter, uint32_t (&words)[4]) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(0xD2511F53u) * c0, second = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(second >> 32) ^ c1 ^ k0;
    c2 = uint32_t(first >> 32) ^ c3 ^ k1;
    c1 = uint32_t(second);
    c3 = uint32_t(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace pvk
