// Stores of rows on the CPU; of large outputs whole cache lines, which are not read first and leave the caches to
// others.
#pragma once

#include <cstdint>

#include "core/moments.h"
#include "core/simd.h"

namespace pvk::PVK_ISA {

constexpr int64_t kStreamedBytes = 5 << 20;  // from here on outputs go past the caches

// Whether an output of so many bytes is written past the caches.
PVK_INLINE bool goes_past_caches([[maybe_unused]] int64_t bytes) {
#if defined(__AVX512F__)
  return bytes >= kStreamedBytes;
#else
  return false;
#endif
}

// Whether rows of `count` elements at `target` are whole cache lines, of an output of `bytes`.
template <typename scalar_t>
PVK_INLINE bool streams(const scalar_t* target, int64_t count, int64_t bytes) {
#if defined(__AVX512F__)
  constexpr int64_t kLine = 64;
  return bytes >= kStreamedBytes && reinterpret_cast<uintptr_t>(target) % kLine == 0 &&
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

// A cache line of 64 bytes, from anywhere.
PVK_INLINE void stream_line(const void* source, void* target) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(target), _mm512_loadu_si512(source));
#else
  std::memcpy(target, source, 64);
#endif
}

// Before another thread may read what was streamed.
PVK_INLINE void end_of_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Copies rows that were made in a buffer to an output; `past` the caches, where an output is larger than they are.
PVK_INLINE void copy_out(void* target, const void* source, int64_t bytes, [[maybe_unused]] bool past) {
#if defined(__AVX512F__)
  constexpr int64_t kLine = 64;
  if (past && bytes >= 2 * kLine) {
    char* const to = static_cast<char*>(target);
    const char* const from = static_cast<const char*>(source);
    int64_t i = int64_t(-reinterpret_cast<uintptr_t>(target) % kLine);
    std::memcpy(to, from, size_t(i));
    for (; i + kLine <= bytes; i += kLine)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    std::memcpy(to + i, from + i, size_t(bytes - i));
    return;
  }
#endif
  std::memcpy(target, source, size_t(bytes));
}

// The bits of bfloat16 in the high half of each lane, rounded to nearest even; NaN stays NaN.
PVK_INLINE VecU32 round_to_high_half(Vec<float> value) {
  const VecU32 bits = (VecU32)value;
  const VecU32 rounded = bits + (((bits >> 16) & 1) + 0x7fff);
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return (VecU32)_mm512_mask_or_epi32((__m512i)rounded, is_nan, (__m512i)bits, _mm512_set1_epi32(0x00400000));
#else
  const VecU32 is_nan = (VecU32)(value != value);
  return ((bits | 0x00400000) & is_nan) | (rounded & ~is_nan);
#endif
}

// Two registers of neighbours, 16 bits each, as one.
typedef uint16_t VecU16 __attribute__((vector_size(kRegisterBytes)));

template <int... kLane>
PVK_INLINE VecU16 high_halves(VecU32 first, VecU32 second, std::integer_sequence<int, kLane...>) {
  const VecU16 order{uint16_t(2 * kLane + 1)...};
  return __builtin_shuffle((VecU16)first, (VecU16)second, order);
}

PVK_INLINE VecU16 narrow_two(Vec<float> first, Vec<float> second, BFloat16) {
  return high_halves(round_to_high_half(first), round_to_high_half(second),
                     std::make_integer_sequence<int, 2 * kLanes<float>>{});
}

PVK_INLINE VecU16 narrow_two(Vec<float> first, Vec<float> second, Float16) {
  Float16 both[2 * kLanes<float>];
  store(both, first);
  store(both + kLanes<float>, second);
  VecU16 result;
  std::memcpy(&result, both, sizeof(result));
  return result;
}

PVK_INLINE void stream(uint16_t* target, VecU16 value) {
#if defined(__AVX512F__)
  return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), (__m512i)value);
#endif
  std::memcpy(target, &value, sizeof(value));
}

// target[i ...] for a row of `count`: values(i, lanes, registers) fills an array of 4, 2 or 1 of them, of which the
// row's end need not all lanes; `past` the caches where streams() says so.
template <typename scalar_t, typename Values>
PVK_INLINE void write_registers(scalar_t* target, int64_t count, bool past, const Values& values) {
  using T = opmath_t<scalar_t>;
  constexpr int64_t kSide = kLanes<T>;
  constexpr bool kNarrows = sizeof(scalar_t) == 2;
  int64_t i = 0;
  const auto one = [&](int64_t end) __attribute__((always_inline)) {
    const int lanes = int(kSide < end - i ? kSide : end - i);
    Vec<T> value[1];
    values(i, lanes, value);
    if (!kNarrows && past && lanes == kSide) {
      stream(target + i, value[0]);
    } else {
      store_lanes(target + i, value[0], lanes);
    }
    i += lanes;
  };
  const auto several = [&](auto number) __attribute__((always_inline)) {
    constexpr int kNumber = decltype(number)::value;
    Vec<T> value[kNumber];
    values(i, int(kSide), value);
#pragma GCC unroll 4
    for (int v = 0; v < kNumber; v += 2) {
      if constexpr (kNarrows) {
        uint16_t* const raw = reinterpret_cast<uint16_t*>(target) + i + v * kSide;
        const VecU16 both = narrow_two(value[v], value[v + 1], scalar_t());
        past ? stream(raw, both) : void(std::memcpy(raw, &both, sizeof(both)));
      } else {
        scalar_t* const at = target + i + v * kSide;
        past ? stream(at, value[v]) : store(at, value[v]);
        past ? stream(at + kSide, value[v + 1]) : store(at + kSide, value[v + 1]);
      }
    }
    i += kNumber * kSide;
  };
  while (i + 4 * kSide <= count) several(std::integral_constant<int, 4>());
  if (i + 2 * kSide <= count) several(std::integral_constant<int, 2>());
  while (i < count) one(count);
}

// target[i ...] = value(i, lanes) for a row of `count`; `past` the caches where streams() says so.
template <typename scalar_t, typename Value>
PVK_INLINE void write_row(scalar_t* target, int64_t count, bool past, const Value& value) {
  using T = opmath_t<scalar_t>;
  constexpr int kSide = kLanes<T>;
  if constexpr (sizeof(scalar_t) == 2) {
    const auto two = [&](int64_t i) __attribute__((always_inline)) {
      return narrow_two(value(i, kSide), value(i + kSide, kSide), scalar_t());
    };
    uint16_t* const raw = reinterpret_cast<uint16_t*>(target);
    int64_t i = 0;
    if (past) {
      for (; i + 2 * kSide <= count; i += 2 * kSide) stream(raw + i, two(i));
    }
    for (; i + 2 * kSide <= count; i += 2 * kSide) {
      const VecU16 both = two(i);
      std::memcpy(raw + i, &both, sizeof(both));
    }
    if (i + kSide <= count) {
      store(target + i, value(i, kSide));
      i += kSide;
    }
    if (i < count) store_first(target + i, value(i, int(count - i)), count - i);
  } else if (past) {
    for_row<T>(count,
               [&](int64_t i, int lanes, int) __attribute__((always_inline)) { stream(target + i, value(i, lanes)); });
  } else {
    for_row<T>(count, [&](int64_t i, int lanes, int)
                          __attribute__((always_inline)) { store_lanes(target + i, value(i, lanes), lanes); });
  }
}

}  // namespace pvk::PVK_ISA
