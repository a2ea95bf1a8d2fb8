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

// ---- one rounding per operation, never a fused multiply-add: results are the same on every device ----
// On the host by -ffp-contract=off.

#if defined(__CUDA_ARCH__)
#define PVK_ROUNDED(name, op, single, double_)      \
  PVK_HOST_DEVICE float name(float a, float b) {    \
    return single(a, b);                            \
  }                                                 \
  PVK_HOST_DEVICE double name(double a, double b) { \
    return double_(a, b);                           \
  }
#else
#define PVK_ROUNDED(name, op, single, double_)      \
  PVK_HOST_DEVICE float name(float a, float b) {    \
    return a op b;                                  \
  }                                                 \
  PVK_HOST_DEVICE double name(double a, double b) { \
    return a op b;                                  \
  }
#endif
PVK_ROUNDED(add_rn, +, __fadd_rn, __dadd_rn)
PVK_ROUNDED(sub_rn, -, __fsub_rn, __dsub_rn)
PVK_ROUNDED(mul_rn, *, __fmul_rn, __dmul_rn)
PVK_ROUNDED(div_rn, /, __fdiv_rn, __ddiv_rn)
#undef PVK_ROUNDED

}  // namespace pvk
