// The scalar intrinsics, barriers of a block, and loads and stores with cache hints. The fast-math forms are exact.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "simt/simt.h"
#include "simt/warp.h"

// ---- barriers ----

inline void __syncthreads(SIMT_ONLY_SITE) {
  simt::sync_threads("__syncthreads", simt::Reduce::kNone, false, simt_site);
}
inline int __syncthreads_count(int predicate SIMT_SITE) {
  return int(simt::sync_threads("__syncthreads_count", simt::Reduce::kCount, predicate != 0, simt_site));
}
inline int __syncthreads_and(int predicate SIMT_SITE) {
  return int(simt::sync_threads("__syncthreads_and", simt::Reduce::kAnd, predicate != 0, simt_site));
}
inline int __syncthreads_or(int predicate SIMT_SITE) {
  return int(simt::sync_threads("__syncthreads_or", simt::Reduce::kOr, predicate != 0, simt_site));
}

[[noreturn]] inline void __trap() {
  simt::fail("__trap");
}

long long clock64();  // each call is one later

// ---- bits ----

inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(unsigned(x));
}
inline int __clzll(long long x) {
  return std::countl_zero(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}

inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(unsigned(x))) << 32 | __brev(unsigned(x >> 32));
}

// Selectors of 4 bits; the top one spreads the byte's sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selectors) {
  const uint64_t both = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> 4 * i & 15;
    const unsigned byte = unsigned(both >> 8 * (selector & 7)) & 255;
    result |= (selector & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32 | low) << (shift < 32 ? shift : 32)) >> 32);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift < 32 ? shift : 32));
}

// ---- integers ----

inline int __mulhi(int a, int b) {
  return int(int64_t(a) * b >> 32);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned(uint64_t(a) * b >> 32);
}
inline long long __mul64hi(long long a, long long b) {
  return static_cast<long long>(static_cast<__int128>(a) * b >> 64);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __mul24(int a, int b) {
  return int(unsigned(int(unsigned(a) << 8) >> 8) * unsigned(int(unsigned(b) << 8) >> 8));
}
inline unsigned __umul24(unsigned a, unsigned b) {
  return (a & 0xffffffu) * (b & 0xffffffu);
}
inline unsigned __sad(int a, int b, unsigned c) {
  return (a < b ? unsigned(b) - unsigned(a) : unsigned(a) - unsigned(b)) + c;
}
inline unsigned __usad(unsigned a, unsigned b, unsigned c) {
  return (a < b ? b - a : a - b) + c;
}

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c = int(unsigned(c) + unsigned(int8_t(a >> i) * int8_t(b >> i)));
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}

// ---- min and max: CUDA has them at global scope ----

#define SIMT_MIN_MAX(T)       \
  constexpr T min(T a, T b) { \
    return b < a ? b : a;     \
  }                           \
  constexpr T max(T a, T b) { \
    return a < b ? b : a;     \
  }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX

// One signed and one unsigned operand: both count as unsigned.
#define SIMT_MIN_MAX_MIXED(Signed, Unsigned)     \
  constexpr Unsigned min(Signed a, Unsigned b) { \
    return min(static_cast<Unsigned>(a), b);     \
  }                                              \
  constexpr Unsigned min(Unsigned a, Signed b) { \
    return min(a, static_cast<Unsigned>(b));     \
  }                                              \
  constexpr Unsigned max(Signed a, Unsigned b) { \
    return max(static_cast<Unsigned>(a), b);     \
  }                                              \
  constexpr Unsigned max(Unsigned a, Signed b) { \
    return max(a, static_cast<Unsigned>(b));     \
  }
SIMT_MIN_MAX_MIXED(int, unsigned)
SIMT_MIN_MAX_MIXED(long, unsigned long)
SIMT_MIN_MAX_MIXED(long long, unsigned long long)
#undef SIMT_MIN_MAX_MIXED

// Of a number and NaN, the number. -0 is below +0.
#define SIMT_MIN_MAX(T, A, B)                                            \
  inline T min(A a, B b) {                                               \
    return b != b || a < b || (a == b && std::signbit(a)) ? T(a) : T(b); \
  }                                                                      \
  inline T max(A a, B b) {                                               \
    return b != b || b < a || (a == b && std::signbit(b)) ? T(a) : T(b); \
  }
SIMT_MIN_MAX(float, float, float)
SIMT_MIN_MAX(double, double, double)
SIMT_MIN_MAX(double, float, double)
SIMT_MIN_MAX(double, double, float)
#undef SIMT_MIN_MAX

#include "simt/float_intrinsics.h"
#include "simt/load_store.h"
