// Loads and stores with cache hints, each one access of the type's whole size.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/simt.h"

namespace simt {

template <size_t kBytes>
struct Word;
template <>
struct Word<1> {
  typedef uint8_t Type __attribute__((may_alias));
};
template <>
struct Word<2> {
  typedef uint16_t Type __attribute__((may_alias));
};
template <>
struct Word<4> {
  typedef uint32_t Type __attribute__((may_alias));
};
template <>
struct Word<8> {
  typedef uint64_t Type __attribute__((may_alias));
};
template <>
struct Word<16> {
  typedef uint32_t Type __attribute__((may_alias, vector_size(16)));
};

template <typename T>
inline __attribute__((always_inline)) T load(const T* address) {
  using Bits = typename Word<sizeof(T)>::Type;
  return __builtin_bit_cast(T, *reinterpret_cast<const Bits*>(address));
}

// What a loop may poll.
template <typename T>
inline __attribute__((always_inline)) T load_volatile(const T* address) {
  using Bits = typename Word<sizeof(T)>::Type;
#if !defined(SIMT_HOOKS)  // the hook of a volatile access does it
  check_access(address, sizeof(T), Access::kAtomicRead);
  spin();
#endif
  return __builtin_bit_cast(T, *reinterpret_cast<const volatile Bits*>(address));
}

template <typename T>
inline __attribute__((always_inline)) void store(T* address, T value) {
  using Bits = typename Word<sizeof(T)>::Type;
  *reinterpret_cast<Bits*>(address) = __builtin_bit_cast(Bits, value);
}

}  // namespace simt

#define SIMT_LOAD(T, name, load)                                   \
  inline __attribute__((always_inline)) T name(const T* address) { \
    return simt::load(address);                                    \
  }
#define SIMT_STORE(T, name)                                              \
  inline __attribute__((always_inline)) void name(T* address, T value) { \
    simt::store(address, value);                                         \
  }
#define SIMT_LOADS_AND_STORES(T)      \
  SIMT_LOAD(T, __ldg, load)           \
  SIMT_LOAD(T, __ldca, load)          \
  SIMT_LOAD(T, __ldcg, load)          \
  SIMT_LOAD(T, __ldcs, load)          \
  SIMT_LOAD(T, __ldlu, load)          \
  SIMT_LOAD(T, __ldcv, load_volatile) \
  SIMT_STORE(T, __stwb)               \
  SIMT_STORE(T, __stcg)               \
  SIMT_STORE(T, __stcs)               \
  SIMT_STORE(T, __stwt)

SIMT_LOADS_AND_STORES(char)
SIMT_LOADS_AND_STORES(signed char)
SIMT_LOADS_AND_STORES(unsigned char)
SIMT_LOADS_AND_STORES(short)
SIMT_LOADS_AND_STORES(unsigned short)
SIMT_LOADS_AND_STORES(int)
SIMT_LOADS_AND_STORES(unsigned)
SIMT_LOADS_AND_STORES(long)
SIMT_LOADS_AND_STORES(unsigned long)
SIMT_LOADS_AND_STORES(long long)
SIMT_LOADS_AND_STORES(unsigned long long)
SIMT_LOADS_AND_STORES(float)
SIMT_LOADS_AND_STORES(double)
SIMT_LOADS_AND_STORES(char2)
SIMT_LOADS_AND_STORES(char4)
SIMT_LOADS_AND_STORES(uchar2)
SIMT_LOADS_AND_STORES(uchar4)
SIMT_LOADS_AND_STORES(short2)
SIMT_LOADS_AND_STORES(short4)
SIMT_LOADS_AND_STORES(ushort2)
SIMT_LOADS_AND_STORES(ushort4)
SIMT_LOADS_AND_STORES(int2)
SIMT_LOADS_AND_STORES(int4)
SIMT_LOADS_AND_STORES(uint2)
SIMT_LOADS_AND_STORES(uint4)
SIMT_LOADS_AND_STORES(longlong2)
SIMT_LOADS_AND_STORES(ulonglong2)
SIMT_LOADS_AND_STORES(float2)
SIMT_LOADS_AND_STORES(float4)
SIMT_LOADS_AND_STORES(double2)
