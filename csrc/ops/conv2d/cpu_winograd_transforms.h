// The small matrices of Winograd's convolution F(m x m, 3 x 3), m = 2 or 4, as arithmetic on vectors:
// Y = A^T [(G g G^T) * (B^T d B)] A, of a tile d of m + 2 pixels a side and 3 x 3 taps g.
//
// F(4) interpolates at 0, +-5/8, +-3/2 and infinity: all constants of B and A are exact, and the result has less than
// half the rounding error of the usual points +-1 and +-2.
#pragma once

#include "core/simd.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

template <int kOut>
struct Winograd;

template <>
struct Winograd<2> {
  template <typename V>
  PVK_INLINE static void input(const V* d, V* t) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }

  template <typename T, typename V>
  PVK_INLINE static void weight(const V* g, V* t) {
    const V even = (g[0] + g[2]) * T(0.5), odd = g[1] * T(0.5);
    t[0] = g[0];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = g[2];
  }

  template <typename V>
  PVK_INLINE static void output(const V* m, V* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
};

template <>
struct Winograd<4> {
  static constexpr double kA = 0.625, kB = 1.5;
  static constexpr double kA2 = kA * kA, kB2 = kB * kB;

  template <typename T>
  PVK_INLINE static Vec<T> of(double constant) {
    return splat(T(constant));
  }
  PVK_INLINE static float element(Vec<float>) { return 0; }
  PVK_INLINE static double element(Vec<double>) { return 0; }

  template <typename V>
  PVK_INLINE static void input(const V* d, V* t) {
    using T = decltype(element(V{}));
    const V even_a = fma(of<T>(-kB2), d[2], d[4]), odd_a = fma(of<T>(-kB2), d[1], d[3]);
    const V even_b = fma(of<T>(-kA2), d[2], d[4]), odd_b = fma(of<T>(-kA2), d[1], d[3]);
    t[0] = fma(of<T>(kA2 * kB2), d[0], fma(of<T>(-kA2 - kB2), d[2], d[4]));
    t[1] = fma(of<T>(kA), odd_a, even_a);
    t[2] = fma(of<T>(-kA), odd_a, even_a);
    t[3] = fma(of<T>(kB), odd_b, even_b);
    t[4] = fma(of<T>(-kB), odd_b, even_b);
    t[5] = fma(of<T>(kA2 * kB2), d[1], fma(of<T>(-kA2 - kB2), d[3], d[5]));
  }

  template <typename T, typename V>
  PVK_INLINE static void weight(const V* g, V* t) {
    constexpr double scale_a = 1 / (2 * kA2 * (kA2 - kB2)), scale_b = 1 / (2 * kB2 * (kB2 - kA2));
    const V even_a = fma(of<T>(scale_a * kA2), g[2], g[0] * T(scale_a)), odd_a = g[1] * T(scale_a * kA);
    const V even_b = fma(of<T>(scale_b * kB2), g[2], g[0] * T(scale_b)), odd_b = g[1] * T(scale_b * kB);
    t[0] = g[0] * T(1 / (kA2 * kB2));
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[2];
  }

  template <typename V>
  PVK_INLINE static void output(const V* m, V* y) {
    using T = decltype(element(V{}));
    const V even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const V even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + (even_a + even_b);
    y[1] = fma(of<T>(kB), odd_b, odd_a * T(kA));
    y[2] = fma(of<T>(kB2), even_b, even_a * T(kA2));
    y[3] = fma(of<T>(kB2 * kB), odd_b, fma(of<T>(kA2 * kA), odd_a, m[5]));
  }
};

}  // namespace pvk::conv2d::PVK_ISA
