// Stores of large outputs on the CPU: whole cache lines that are not read first, and leave the caches to others.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace pvk::PVK_ISA {

constexpr int64_t kStreamedBytes = 5 << 20;  // from here on outputs go past the caches

// Whether rows of `count` elements at `target` are whole cache lines, one register each, of an output of `bytes`.
template <typename scalar_t>
PVK_INLINE bool streams(const scalar_t* target, int64_t count, int64_t bytes) {
#if defined(__AVX512F__)
  constexpr int64_t kLine = 64;
  return bytes >= kStreamedBytes && sizeof(scalar_t) >= 4 && reinterpret_cast<uintptr_t>(target) % kLine == 0 &&
         count * int64_t(sizeof(scalar_t)) % kLine == 0;
#else
  (void)target, (void)count, (void)bytes;
  return false;
#endif
}

template <typename scalar_t>
PVK_INLINE void stream(scalar_t* target, Vec<opmath_t<scalar_t>> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 4) return _mm512_stream_ps(target, (__m512)value);
  if constexpr (sizeof(scalar_t) == 8) return _mm512_stream_pd(target, (__m512d)value);
#endif
  store(target, value);
}

// Before another thread may read what was streamed.
PVK_INLINE void end_of_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace pvk::PVK_ISA
