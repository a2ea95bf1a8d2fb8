// The collectives of a warp. Each waits for the lanes of its mask, all at one source line; the last one computes.
// __activemask is absent: its value depends on the schedule.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "simt/simt.h"

namespace simt {

enum class Shuffle { kIndex, kUp, kDown, kXor };
enum class Vote { kBallot, kAny, kAll, kMatchAny, kMatchAll };
enum class Fold { kAdd, kMin, kMax, kAnd, kOr, kXor };

uint64_t shuffle(const char* name, Shuffle kind, unsigned mask, uint64_t value, unsigned lane, int width,
                 Site simt_site);
unsigned vote(const char* name, Vote kind, unsigned mask, uint64_t value, Site simt_site);
unsigned fold(const char* name, Fold kind, bool is_signed, unsigned mask, unsigned value, Site simt_site);

template <typename T>
using BitsOf = std::conditional_t<
    sizeof(T) == 8, uint64_t,
    std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>>;

template <typename T>
inline T shuffle_value(const char* name, Shuffle kind, unsigned mask, T value, unsigned lane, int width,
                       Site simt_site) {
  const uint64_t got = shuffle(name, kind, mask, std::bit_cast<BitsOf<T>>(value), lane, width, simt_site);
  return std::bit_cast<T>(BitsOf<T>(got));
}

}  // namespace simt

#define SIMT_SHUFFLE(T, name, kind, Lane)                                                                  \
  inline T name(unsigned mask, T value, Lane lane, int width = simt::kWarpSize SIMT_SITE) {                \
    return simt::shuffle_value(#name, simt::Shuffle::kind, mask, value, unsigned(lane), width, simt_site); \
  }
#define SIMT_SHUFFLES(T)                             \
  SIMT_SHUFFLE(T, __shfl_sync, kIndex, int)          \
  SIMT_SHUFFLE(T, __shfl_up_sync, kUp, unsigned)     \
  SIMT_SHUFFLE(T, __shfl_down_sync, kDown, unsigned) \
  SIMT_SHUFFLE(T, __shfl_xor_sync, kXor, int)
SIMT_SHUFFLES(int)
SIMT_SHUFFLES(unsigned)
SIMT_SHUFFLES(long)
SIMT_SHUFFLES(unsigned long)
SIMT_SHUFFLES(long long)
SIMT_SHUFFLES(unsigned long long)
SIMT_SHUFFLES(float)
SIMT_SHUFFLES(double)

inline unsigned __ballot_sync(unsigned mask, int predicate SIMT_SITE) {
  return simt::vote("__ballot_sync", simt::Vote::kBallot, mask, predicate != 0, simt_site);
}
inline int __any_sync(unsigned mask, int predicate SIMT_SITE) {
  return int(simt::vote("__any_sync", simt::Vote::kAny, mask, predicate != 0, simt_site));
}
inline int __all_sync(unsigned mask, int predicate SIMT_SITE) {
  return int(simt::vote("__all_sync", simt::Vote::kAll, mask, predicate != 0, simt_site));
}

#define SIMT_MATCHES(T)                                                                                                \
  inline unsigned __match_any_sync(unsigned mask, T value SIMT_SITE) {                                                 \
    return simt::vote("__match_any_sync", simt::Vote::kMatchAny, mask, std::bit_cast<simt::BitsOf<T>>(value),          \
                      simt_site);                                                                                      \
  }                                                                                                                    \
  inline unsigned __match_all_sync(unsigned mask, T value, int* predicate SIMT_SITE) {                                 \
    const unsigned all =                                                                                               \
        simt::vote("__match_all_sync", simt::Vote::kMatchAll, mask, std::bit_cast<simt::BitsOf<T>>(value), simt_site); \
    *predicate = all != 0;                                                                                             \
    return all;                                                                                                        \
  }
SIMT_MATCHES(int)
SIMT_MATCHES(unsigned)
SIMT_MATCHES(long)
SIMT_MATCHES(unsigned long)
SIMT_MATCHES(long long)
SIMT_MATCHES(unsigned long long)
SIMT_MATCHES(float)
SIMT_MATCHES(double)
#undef SIMT_MATCHES

#define SIMT_FOLD(T, name, kind)                                                                          \
  inline T name(unsigned mask, T value SIMT_SITE) {                                                       \
    return T(simt::fold(#name, simt::Fold::kind, std::is_signed_v<T>, mask, unsigned(value), simt_site)); \
  }
SIMT_FOLD(unsigned, __reduce_add_sync, kAdd)
SIMT_FOLD(int, __reduce_add_sync, kAdd)
SIMT_FOLD(unsigned, __reduce_min_sync, kMin)
SIMT_FOLD(int, __reduce_min_sync, kMin)
SIMT_FOLD(unsigned, __reduce_max_sync, kMax)
SIMT_FOLD(int, __reduce_max_sync, kMax)
SIMT_FOLD(unsigned, __reduce_and_sync, kAnd)
SIMT_FOLD(unsigned, __reduce_or_sync, kOr)
SIMT_FOLD(unsigned, __reduce_xor_sync, kXor)
#undef SIMT_FOLD

inline void __syncwarp(unsigned mask = 0xffffffffu SIMT_SITE) {
  simt::sync_warp(mask, simt_site);
}
