// A 16-bit float and its pair: cuda_fp16.h and cuda_bf16.h each include this once, with SIMT_T and the like defined.
// The conversions are CUDA's, implicit ones too, so that what is ambiguous there is ambiguous here.

struct alignas(2) SIMT_RAW {
  unsigned short x;
};
struct alignas(4) SIMT_RAW2 {
  unsigned short x, y;
};

struct alignas(2) SIMT_T {
 protected:
  unsigned short __x;

 public:
  SIMT_T() = default;
  constexpr SIMT_T(const SIMT_RAW& raw) : __x(raw.x) {}
  constexpr operator SIMT_RAW() const { return {__x}; }

  explicit SIMT_T(SIMT_OTHER x);
  SIMT_T(float x) : __x(SIMT_FORMAT::from(x)) {}
  SIMT_T(double x) : __x(SIMT_FORMAT::from(x)) {}
  operator float() const { return SIMT_FORMAT::to_float(__x); }
  constexpr operator bool() const { return (__x & 0x7fff) != 0; }

#define SIMT_FROM_INTEGER(Int) \
  SIMT_T(Int x) : __x(SIMT_FORMAT::from(simt::odd_double(x))) {}
#define SIMT_TO_INTEGER(Int)                                                             \
  operator Int() const {                                                                 \
    return simt::to_integer<Int>(SIMT_FORMAT::to_float(__x), simt::Round::kZero, false); \
  }
  SIMT_FROM_INTEGER(short)
  SIMT_FROM_INTEGER(unsigned short)
  SIMT_FROM_INTEGER(int)
  SIMT_FROM_INTEGER(unsigned)
  SIMT_FROM_INTEGER(long)
  SIMT_FROM_INTEGER(unsigned long)
  SIMT_FROM_INTEGER(long long)
  SIMT_FROM_INTEGER(unsigned long long)
  SIMT_TO_INTEGER(char)
  SIMT_TO_INTEGER(signed char)
  SIMT_TO_INTEGER(unsigned char)
  SIMT_TO_INTEGER(short)
  SIMT_TO_INTEGER(unsigned short)
  SIMT_TO_INTEGER(int)
  SIMT_TO_INTEGER(unsigned)
  SIMT_TO_INTEGER(long)
  SIMT_TO_INTEGER(unsigned long)
  SIMT_TO_INTEGER(long long)
  SIMT_TO_INTEGER(unsigned long long)
#undef SIMT_FROM_INTEGER
#undef SIMT_TO_INTEGER
};

struct alignas(4) SIMT_T2 {
  SIMT_T x, y;

  SIMT_T2() = default;
  constexpr SIMT_T2(const SIMT_T& x, const SIMT_T& y) : x(x), y(y) {}
  constexpr SIMT_T2(const SIMT_RAW2& raw) : x(SIMT_RAW{raw.x}), y(SIMT_RAW{raw.y}) {}
  constexpr operator SIMT_RAW2() const { return {SIMT_RAW(x).x, SIMT_RAW(y).x}; }
};

#define SIMT_BITS(a) (SIMT_RAW(a).x)
#define SIMT_FROM_BITS(bits) SIMT_T(SIMT_RAW{static_cast<unsigned short>(bits)})
#define SIMT_FLOAT(a) SIMT_FORMAT::to_float(SIMT_BITS(a))
#define SIMT_NARROW(x) SIMT_FROM_BITS(SIMT_FORMAT::from(x))

// ---- conversions of scalars ----

inline float SIMT_NAME(__, 2float)(SIMT_T a) {
  return SIMT_FORMAT::to_float(SIMT_BITS(a));
}
inline SIMT_T SIMT_NAME(__float2, )(float x) {
  return SIMT_NARROW(x);
}
inline SIMT_T SIMT_NAME(__double2, )(double x) {
  return SIMT_NARROW(x);
}
inline SIMT_T SIMT_NAME(__float2, _rn)(float x) {
  return SIMT_NARROW(x);
}
inline SIMT_T SIMT_NAME(__float2, _rz)(float x) {
  return SIMT_FROM_BITS(SIMT_FORMAT::from(double(x), simt::Round::kZero));
}
inline SIMT_T SIMT_NAME(__float2, _rd)(float x) {
  return SIMT_FROM_BITS(SIMT_FORMAT::from(double(x), simt::Round::kDown));
}
inline SIMT_T SIMT_NAME(__float2, _ru)(float x) {
  return SIMT_FROM_BITS(SIMT_FORMAT::from(double(x), simt::Round::kUp));
}

#define SIMT_INTEGER(Int, name, suffix, round)                                                    \
  inline SIMT_T SIMT_NAME(__##name##2, _##suffix)(Int x) {                                        \
    return SIMT_FROM_BITS(SIMT_FORMAT::from(simt::odd_double(x), simt::Round::round));            \
  }                                                                                               \
  inline Int SIMT_NAME(__, 2##name##_##suffix)(SIMT_T a) {                                        \
    return simt::to_integer<Int>(SIMT_FORMAT::to_float(SIMT_BITS(a)), simt::Round::round, false); \
  }
#define SIMT_INTEGERS(Int, name)        \
  SIMT_INTEGER(Int, name, rn, kNearest) \
  SIMT_INTEGER(Int, name, rz, kZero)    \
  SIMT_INTEGER(Int, name, rd, kDown)    \
  SIMT_INTEGER(Int, name, ru, kUp)
SIMT_INTEGERS(short, short)
SIMT_INTEGERS(unsigned short, ushort)
SIMT_INTEGERS(int, int)
SIMT_INTEGERS(unsigned, uint)
SIMT_INTEGERS(long long, ll)
SIMT_INTEGERS(unsigned long long, ull)
#undef SIMT_INTEGER
#undef SIMT_INTEGERS

inline signed char SIMT_NAME(__, 2char_rz)(SIMT_T a) {
  return static_cast<signed char>(a);
}
inline unsigned char SIMT_NAME(__, 2uchar_rz)(SIMT_T a) {
  return static_cast<unsigned char>(a);
}
inline short SIMT_NAME(__, _as_short)(SIMT_T a) {
  return short(SIMT_BITS(a));
}
inline unsigned short SIMT_NAME(__, _as_ushort)(SIMT_T a) {
  return SIMT_BITS(a);
}
inline SIMT_T SIMT_NAME(__short_as_, )(short bits) {
  return SIMT_FROM_BITS(bits);
}
inline SIMT_T SIMT_NAME(__ushort_as_, )(unsigned short bits) {
  return SIMT_FROM_BITS(bits);
}

// ---- pairs ----

inline SIMT_T2 SIMT_NAME2(make_, )(SIMT_T x, SIMT_T y) {
  return {x, y};
}
inline SIMT_T2 SIMT_NAME2(__halves2, )(SIMT_T low, SIMT_T high) {
  return {low, high};
}
inline SIMT_T2 SIMT_SPREAD(SIMT_T a) {
  return {a, a};
}
inline SIMT_T SIMT_NAME(__low2, )(SIMT_T2 a) {
  return a.x;
}
inline SIMT_T SIMT_NAME(__high2, )(SIMT_T2 a) {
  return a.y;
}
inline float __low2float(SIMT_T2 a) {
  return a.x;
}
inline float __high2float(SIMT_T2 a) {
  return a.y;
}
inline SIMT_T2 SIMT_NAME2(__low2, )(SIMT_T2 a) {
  return {a.x, a.x};
}
inline SIMT_T2 SIMT_NAME2(__high2, )(SIMT_T2 a) {
  return {a.y, a.y};
}
inline SIMT_T2 SIMT_NAME2(__lows2, )(SIMT_T2 a, SIMT_T2 b) {
  return {a.x, b.x};
}
inline SIMT_T2 SIMT_NAME2(__highs2, )(SIMT_T2 a, SIMT_T2 b) {
  return {a.y, b.y};
}
inline SIMT_T2 __lowhigh2highlow(SIMT_T2 a) {
  return {a.y, a.x};
}
inline float2 SIMT_NAME2(__, 2float2)(SIMT_T2 a) {
  return {a.x, a.y};
}
inline SIMT_T2 SIMT_NAME2(__float22, _rn)(float2 a) {
  return {a.x, a.y};
}
inline SIMT_T2 SIMT_NAME2(__floats2, _rn)(float x, float y) {
  return {x, y};
}
inline SIMT_T2 SIMT_NAME2(__float2, _rn)(float x) {
  return {x, x};
}
