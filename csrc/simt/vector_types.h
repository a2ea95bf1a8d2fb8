// CUDA's vector types, with its sizes and alignments: pairs and fours are aligned to their size, but at most to 16.
#pragma once

#define SIMT_VECTORS(name, T)                                  \
  struct name##1 {                                             \
    T x;                                                       \
  };                                                           \
  struct alignas(2 * sizeof(T)) name##2 {                      \
    T x, y;                                                    \
  };                                                           \
  struct name##3 {                                             \
    T x, y, z;                                                 \
  };                                                           \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { \
    T x, y, z, w;                                              \
  };                                                           \
  constexpr name##1 make_##name##1(T x) {                      \
    return {x};                                                \
  }                                                            \
  constexpr name##2 make_##name##2(T x, T y) {                 \
    return {x, y};                                             \
  }                                                            \
  constexpr name##3 make_##name##3(T x, T y, T z) {            \
    return {x, y, z};                                          \
  }                                                            \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) {       \
    return {x, y, z, w};                                       \
  }

SIMT_VECTORS(char, signed char)
SIMT_VECTORS(uchar, unsigned char)
SIMT_VECTORS(short, short)
SIMT_VECTORS(ushort, unsigned short)
SIMT_VECTORS(int, int)
SIMT_VECTORS(uint, unsigned)
SIMT_VECTORS(long, long)
SIMT_VECTORS(ulong, unsigned long)
SIMT_VECTORS(longlong, long long)
SIMT_VECTORS(ulonglong, unsigned long long)
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
#undef SIMT_VECTORS

struct dim3 {
  unsigned x, y, z;

  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
