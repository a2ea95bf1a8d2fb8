// Atomics and fences. One OS thread runs a kernel, so that a plain update is atomic; each one lets the others run.
#pragma once

#include <cstring>

#include "simt/simt.h"

namespace simt {

// The access is checked by the caller, once, as an atomic: the compiler's hooks must not see it as a plain one.
template <typename T, typename F>
__attribute__((noinline, no_sanitize("thread"))) T update(T* address, const F& next) {
  const T old = *address;
  *address = next(old);
  if (std::memcmp(address, &old, sizeof(T)) != 0) progress();
  return old;
}

template <bool kReads, typename T, typename F>
inline __attribute__((always_inline)) T atomic_update(T* address, const F& next) {
  if constexpr (kReads) check_access(address, sizeof(T), Access::kAtomicRead);
  check_access(address, sizeof(T), Access::kAtomicWrite);
  const T old = update(address, next);
  spin();
  return old;
}

}  // namespace simt

#define SIMT_ATOMIC_OF_SCOPE(T, name, reads, expression)                                                  \
  inline __attribute__((always_inline)) T name(T* address, T value) {                                     \
    return simt::atomic_update<reads>(                                                                    \
        address, [=]([[maybe_unused]] T old) __attribute__((always_inline)) -> T { return expression; }); \
  }
#define SIMT_ATOMIC_OF_SCOPES(T, name, reads, expression)  \
  SIMT_ATOMIC_OF_SCOPE(T, name, reads, expression)         \
  SIMT_ATOMIC_OF_SCOPE(T, name##_block, reads, expression) \
  SIMT_ATOMIC_OF_SCOPE(T, name##_system, reads, expression)
#define SIMT_ATOMIC(T, name, expression) SIMT_ATOMIC_OF_SCOPES(T, name, true, expression)

// int overflows as unsigned does.
SIMT_ATOMIC(int, atomicAdd, int(unsigned(old) + unsigned(value)))
SIMT_ATOMIC(unsigned, atomicAdd, old + value)
SIMT_ATOMIC(unsigned long long, atomicAdd, old + value)
SIMT_ATOMIC(float, atomicAdd, old + value)
SIMT_ATOMIC(double, atomicAdd, old + value)
SIMT_ATOMIC(int, atomicSub, int(unsigned(old) - unsigned(value)))
SIMT_ATOMIC(unsigned, atomicSub, old - value)
SIMT_ATOMIC_OF_SCOPES(int, atomicExch, false, value)
SIMT_ATOMIC_OF_SCOPES(unsigned, atomicExch, false, value)
SIMT_ATOMIC_OF_SCOPES(unsigned long long, atomicExch, false, value)
SIMT_ATOMIC_OF_SCOPES(float, atomicExch, false, value)
SIMT_ATOMIC(unsigned, atomicInc, old >= value ? 0 : old + 1)
SIMT_ATOMIC(unsigned, atomicDec, old == 0 || old > value ? value : old - 1)

#define SIMT_ATOMIC_MIN_MAX(T)                         \
  SIMT_ATOMIC(T, atomicMin, value < old ? value : old) \
  SIMT_ATOMIC(T, atomicMax, old < value ? value : old)
SIMT_ATOMIC_MIN_MAX(int)
SIMT_ATOMIC_MIN_MAX(unsigned)
SIMT_ATOMIC_MIN_MAX(long long)
SIMT_ATOMIC_MIN_MAX(unsigned long long)
#undef SIMT_ATOMIC_MIN_MAX

#define SIMT_ATOMIC_BITS(T)             \
  SIMT_ATOMIC(T, atomicAnd, old& value) \
  SIMT_ATOMIC(T, atomicOr, old | value) \
  SIMT_ATOMIC(T, atomicXor, old ^ value)
SIMT_ATOMIC_BITS(int)
SIMT_ATOMIC_BITS(unsigned)
SIMT_ATOMIC_BITS(unsigned long long)
#undef SIMT_ATOMIC_BITS

#define SIMT_ATOMIC_CAS(T, name)                                                                            \
  inline __attribute__((always_inline)) T name(T* address, T expected, T value) {                           \
    return simt::atomic_update<true>(                                                                       \
        address, [=](T old) __attribute__((always_inline)) -> T { return old == expected ? value : old; }); \
  }
#define SIMT_ATOMIC_CASES(T)          \
  SIMT_ATOMIC_CAS(T, atomicCAS)       \
  SIMT_ATOMIC_CAS(T, atomicCAS_block) \
  SIMT_ATOMIC_CAS(T, atomicCAS_system)
SIMT_ATOMIC_CASES(unsigned short)
SIMT_ATOMIC_CASES(int)
SIMT_ATOMIC_CASES(unsigned)
SIMT_ATOMIC_CASES(unsigned long long)
#undef SIMT_ATOMIC_CAS
#undef SIMT_ATOMIC_CASES

inline void __threadfence() {
  simt::fence();
}
inline void __threadfence_block() {
  simt::fence();
}
inline void __threadfence_system() {
  simt::fence();
}
inline void __nanosleep(unsigned) {
  simt::spin();
}
