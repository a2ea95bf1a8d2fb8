// Host and device index arithmetic. Included by CUDA and CPU kernels alike; everything is inline and branch-light.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PVK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PVK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace pvk {

template <typename Int>
PVK_HOST_DEVICE constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <typename T>
PVK_HOST_DEVICE constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
PVK_HOST_DEVICE constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

// False for NaN and for both infinities.
template <typename T>
PVK_HOST_DEVICE bool is_finite(T value) {
  return value - value == T(0);
}

}  // namespace pvk
