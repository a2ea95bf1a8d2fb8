// What a kernel needs of its warp and of its scalars: shared memory, collectives, conversions, 16-byte access.
// Collectives take the whole, converged warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/types.h"

#define PVK_DEVICE __device__ __forceinline__

// Shared memory: SIMT_SHARED(float[32][33], tile). The host emulator brings its own macros, and tells a wrapper the
// line of its caller: SIMT_SITE is a last parameter (SIMT_ONLY_SITE the only one), SIMT_AT_SITE passes it on.
#if !defined(SIMT_SHARED)
#define SIMT_SHARED(type, name) __shared__::std::type_identity_t<type> name
#define SIMT_DYN_SHARED(type, name)                                           \
  extern __shared__ __align__(16) unsigned char simt_dynamic_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(simt_dynamic_shared_memory)
#define SIMT_SITE
#define SIMT_ONLY_SITE
#define SIMT_AT_SITE
#endif

namespace pvk {

// ---- warp ----

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
PVK_DEVICE T shfl(T value, int lane SIMT_SITE) {
  return __shfl_sync(kFullWarp, value, lane, kWarpSize SIMT_AT_SITE);
}
template <typename T>
PVK_DEVICE T shfl_xor(T value, int mask SIMT_SITE) {
  return __shfl_xor_sync(kFullWarp, value, mask, kWarpSize SIMT_AT_SITE);
}
template <typename T>
PVK_DEVICE T shfl_up(T value, unsigned delta SIMT_SITE) {
  return __shfl_up_sync(kFullWarp, value, delta, kWarpSize SIMT_AT_SITE);
}
template <typename T>
PVK_DEVICE T shfl_down(T value, unsigned delta SIMT_SITE) {
  return __shfl_down_sync(kFullWarp, value, delta, kWarpSize SIMT_AT_SITE);
}
PVK_DEVICE unsigned ballot(bool predicate SIMT_SITE) {
  return __ballot_sync(kFullWarp, predicate SIMT_AT_SITE);
}
PVK_DEVICE unsigned reduce_add(unsigned value SIMT_SITE) {
  return __reduce_add_sync(kFullWarp, value SIMT_AT_SITE);
}
PVK_DEVICE unsigned reduce_max(unsigned value SIMT_SITE) {
  return __reduce_max_sync(kFullWarp, value SIMT_AT_SITE);
}
PVK_DEVICE uint64_t reduce_or(uint64_t value SIMT_SITE) {
  const unsigned low = __reduce_or_sync(kFullWarp, unsigned(value) SIMT_AT_SITE);
  const unsigned high = __reduce_or_sync(kFullWarp, unsigned(value >> 32) SIMT_AT_SITE);
  return uint64_t(high) << 32 | low;
}
PVK_DEVICE void sync_warp(unsigned mask = kFullWarp SIMT_SITE) {
  __syncwarp(mask SIMT_AT_SITE);
}

// Bits below `index`; index < the word's width.
PVK_DEVICE constexpr unsigned bits_below(int index) {
  return (1u << index) - 1;
}
PVK_DEVICE constexpr uint64_t bits_below64(int index) {
  return (uint64_t(1) << index) - 1;
}

// A word that other threads may be changing by atomics.
PVK_DEVICE unsigned load_relaxed(const unsigned* address) {
#if defined(PVK_SIMT) && !defined(SIMT_HOOKS)  // the hook of a volatile access does it
  simt::spin();
#endif
  return *static_cast<const volatile unsigned*>(address);
}

#if !defined(PVK_SIMT)
// What PTX takes for an address in shared memory.
PVK_DEVICE unsigned shared_offset(const void* shared) {
  return unsigned(__cvta_generic_to_shared(shared));
}
#endif

// ---- scalars: arithmetic is in float, or double for double; stores round to nearest even ----

template <typename scalar_t>
using opmath_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

PVK_DEVICE float to_opmath(float value) {
  return value;
}
PVK_DEVICE double to_opmath(double value) {
  return value;
}
PVK_DEVICE float to_opmath(__half value) {
  return __half2float(value);
}
PVK_DEVICE float to_opmath(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <typename scalar_t>
PVK_DEVICE scalar_t from_opmath(opmath_t<scalar_t> value) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

template <typename T, typename scalar_t, int N>
PVK_DEVICE void load_strided(const void* data, int64_t begin, int64_t stride, T (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = T(to_opmath(__ldg(static_cast<const scalar_t*>(data) + begin + i * stride)));
}

// N elements of an array whose dtype only the run knows; the N loads are in flight together.
template <typename T, int N>
PVK_DEVICE void load_strided(const void* data, DType dtype, int64_t begin, int64_t stride, T (&out)[N]) {
  switch (dtype) {
    case DType::kFloat32:
      return load_strided<T, float>(data, begin, stride, out);
    case DType::kFloat64:
      return load_strided<T, double>(data, begin, stride, out);
    case DType::kFloat16:
      return load_strided<T, __half>(data, begin, stride, out);
    case DType::kBFloat16:
      return load_strided<T, __nv_bfloat16>(data, begin, stride, out);
  }
}

// ---- vectors of 4, 8 or 16 bytes: one access ----

template <typename T, int N>
struct alignas(N * sizeof(T)) VecN {
  T data[N];
};

template <int BYTES>
using RawOf = std::conditional_t<BYTES == 16, uint4, std::conditional_t<BYTES == 8, uint2, unsigned>>;

template <typename scalar_t>
constexpr int kVec16 = 16 / int(sizeof(scalar_t));

// Read-only data: the caller knows that nothing writes it during the kernel.
template <int N, typename T>
PVK_DEVICE VecN<T, N> load_vec(const T* address) {
  VecN<T, N> vec;
  if constexpr (N == 1) {
    vec.data[0] = __ldg(address);
  } else {
    using Raw = RawOf<sizeof(vec)>;
    static_assert(sizeof(vec) == sizeof(Raw));
    const Raw raw = __ldg(reinterpret_cast<const Raw*>(address));
    __builtin_memcpy(&vec, &raw, sizeof(vec));
  }
  return vec;
}

template <int N, typename T>
PVK_DEVICE void store_vec(T* address, const VecN<T, N>& vec) {
  if constexpr (N == 1) {
    *address = vec.data[0];
  } else {
    using Raw = RawOf<sizeof(vec)>;
    static_assert(sizeof(vec) == sizeof(Raw));
    Raw raw;
    __builtin_memcpy(&raw, &vec, sizeof(vec));
    __stwb(reinterpret_cast<Raw*>(address), raw);  // a plain store may be split into words
  }
}

}  // namespace pvk
