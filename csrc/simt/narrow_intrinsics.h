// Arithmetic, comparisons and functions of a 16-bit float and its pair; included after narrow_type.h, as often. All are
// as if rounded once: float has more than twice the digits, so that a sum, product or quotient may be rounded again.

// ---- arithmetic ----

#define SIMT_UNARY(name, name2, expression) \
  inline SIMT_T name(SIMT_T a) {            \
    const auto x = SIMT_FLOAT(a);           \
    return SIMT_NARROW(expression);         \
  }                                         \
  inline SIMT_T2 name2(SIMT_T2 a) {         \
    return {name(a.x), name(a.y)};          \
  }
#define SIMT_BINARY(name, name2, expression)         \
  inline SIMT_T name(SIMT_T a, SIMT_T b) {           \
    const auto x = SIMT_FLOAT(a), y = SIMT_FLOAT(b); \
    return SIMT_NARROW(expression);                  \
  }                                                  \
  inline SIMT_T2 name2(SIMT_T2 a, SIMT_T2 b) {       \
    return {name(a.x, b.x), name(a.y, b.y)};         \
  }
#define SIMT_SATURATED(name, name2, plain)                 \
  inline SIMT_T name(SIMT_T a, SIMT_T b) {                 \
    const float x = plain(a, b);                           \
    return SIMT_NARROW(x > 0 ? (x < 1 ? x : 1.0f) : 0.0f); \
  }                                                        \
  inline SIMT_T2 name2(SIMT_T2 a, SIMT_T2 b) {             \
    return {name(a.x, b.x), name(a.y, b.y)};               \
  }
#define SIMT_FMA(name, name2, expression)                                        \
  inline SIMT_T name(SIMT_T a, SIMT_T b, SIMT_T c) {                             \
    const double x = simt::odd_fma(SIMT_FLOAT(a), SIMT_FLOAT(b), SIMT_FLOAT(c)); \
    return SIMT_NARROW(expression);                                              \
  }                                                                              \
  inline SIMT_T2 name2(SIMT_T2 a, SIMT_T2 b, SIMT_T2 c) {                        \
    return {name(a.x, b.x, c.x), name(a.y, b.y, c.y)};                           \
  }

SIMT_BINARY(__hadd, __hadd2, x + y)
SIMT_BINARY(__hsub, __hsub2, x - y)
SIMT_BINARY(__hmul, __hmul2, x* y)
SIMT_BINARY(__hdiv, __h2div, x / y)
SIMT_BINARY(__hadd_rn, __hadd2_rn, x + y)
SIMT_BINARY(__hsub_rn, __hsub2_rn, x - y)
SIMT_BINARY(__hmul_rn, __hmul2_rn, x* y)
SIMT_SATURATED(__hadd_sat, __hadd2_sat, __hadd)
SIMT_SATURATED(__hsub_sat, __hsub2_sat, __hsub)
SIMT_SATURATED(__hmul_sat, __hmul2_sat, __hmul)
SIMT_FMA(__hfma, __hfma2, x)
SIMT_FMA(__hfma_sat, __hfma2_sat, x > 0 ? (x < 1 ? x : 1.0) : 0.0)
SIMT_FMA(__hfma_relu, __hfma2_relu, x <= 0 ? 0.0 : x)
SIMT_UNARY(__hneg, __hneg2, -x)
SIMT_UNARY(__habs, __habs2, x < 0 ? -x : x + 0)

// Of a number and NaN, the number; the _nan forms give NaN. +0 is above -0.
SIMT_BINARY(__hmax_nan, __hmax2_nan, x != x || y < x ? x : x == y && std::signbit(y) ? x : y)
SIMT_BINARY(__hmin_nan, __hmin2_nan, x != x || x < y ? x : x == y && std::signbit(x) ? x : y)
SIMT_BINARY(__hmax, __hmax2, y != y || y < x || (x == y && std::signbit(y)) ? x : y)
SIMT_BINARY(__hmin, __hmin2, y != y || x < y || (x == y && std::signbit(x)) ? x : y)

// ---- functions ----

SIMT_UNARY(hsqrt, h2sqrt, std::sqrt(double(x)))
SIMT_UNARY(hrsqrt, h2rsqrt, 1 / std::sqrt(double(x)))
SIMT_UNARY(hrcp, h2rcp, 1 / double(x))
SIMT_UNARY(hexp, h2exp, std::exp(double(x)))
SIMT_UNARY(hexp2, h2exp2, std::exp2(double(x)))
SIMT_UNARY(hexp10, h2exp10, std::pow(10.0, double(x)))
SIMT_UNARY(hlog, h2log, std::log(double(x)))
SIMT_UNARY(hlog2, h2log2, std::log2(double(x)))
SIMT_UNARY(hlog10, h2log10, std::log10(double(x)))
SIMT_UNARY(hsin, h2sin, std::sin(double(x)))
SIMT_UNARY(hcos, h2cos, std::cos(double(x)))
SIMT_UNARY(htanh, h2tanh, std::tanh(double(x)))
SIMT_UNARY(htanh_approx, h2tanh_approx, std::tanh(double(x)))
SIMT_UNARY(hceil, h2ceil, std::ceil(x))
SIMT_UNARY(hfloor, h2floor, std::floor(x))
SIMT_UNARY(htrunc, h2trunc, std::trunc(x))
SIMT_UNARY(hrint, h2rint, std::nearbyint(x))

#undef SIMT_UNARY
#undef SIMT_BINARY
#undef SIMT_SATURATED
#undef SIMT_FMA

// ---- comparisons: false with NaN; those that end in u, true ----

inline bool __hisnan(SIMT_T a) {
  return (SIMT_BITS(a) & 0x7fff) > SIMT_FORMAT::kInfinity;
}
inline int __hisinf(SIMT_T a) {
  if ((SIMT_BITS(a) & 0x7fff) != SIMT_FORMAT::kInfinity) return 0;
  return SIMT_BITS(a) >> 15 != 0 ? -1 : 1;
}
inline SIMT_T2 __hisnan2(SIMT_T2 a) {
  return {SIMT_NARROW(__hisnan(a.x) ? 1.0f : 0.0f), SIMT_NARROW(__hisnan(a.y) ? 1.0f : 0.0f)};
}

#define SIMT_COMPARE(op, expression)                                                                     \
  inline bool __h##op(SIMT_T a, SIMT_T b) {                                                              \
    const auto x = SIMT_FLOAT(a), y = SIMT_FLOAT(b);                                                     \
    return expression;                                                                                   \
  }                                                                                                      \
  inline SIMT_T2 __h##op##2(SIMT_T2 a, SIMT_T2 b) {                                                      \
    return {SIMT_NARROW(__h##op(a.x, b.x) ? 1.0f : 0.0f), SIMT_NARROW(__h##op(a.y, b.y) ? 1.0f : 0.0f)}; \
  }                                                                                                      \
  inline unsigned __h##op##2_mask(SIMT_T2 a, SIMT_T2 b) {                                                \
    return (__h##op(a.x, b.x) ? 0xffffu : 0) | (__h##op(a.y, b.y) ? 0xffff0000u : 0);                    \
  }                                                                                                      \
  inline bool __hb##op##2(SIMT_T2 a, SIMT_T2 b) {                                                        \
    return __h##op(a.x, b.x) && __h##op(a.y, b.y);                                                       \
  }
SIMT_COMPARE(eq, x == y)
SIMT_COMPARE(ne, x<y || x> y)
SIMT_COMPARE(lt, x < y)
SIMT_COMPARE(le, x <= y)
SIMT_COMPARE(gt, x > y)
SIMT_COMPARE(ge, x >= y)
SIMT_COMPARE(equ, !(x < y || x > y))
SIMT_COMPARE(neu, x != y)
SIMT_COMPARE(ltu, !(x >= y))
SIMT_COMPARE(leu, !(x > y))
SIMT_COMPARE(gtu, !(x <= y))
SIMT_COMPARE(geu, !(x < y))
#undef SIMT_COMPARE

// ---- operators ----

#define SIMT_OPERATOR(T, op, name)                \
  inline T operator op(const T& a, const T& b) {  \
    return name(a, b);                            \
  }                                               \
  inline T& operator op## = (T & a, const T& b) { \
    a = name(a, b);                               \
    return a;                                     \
  }
#define SIMT_STEP(T, op, name, one) \
  inline T& operator op(T& a) {     \
    a = name(a, one);               \
    return a;                       \
  }                                 \
  inline T operator op(T& a, int) { \
    const T old = a;                \
    a = name(a, one);               \
    return old;                     \
  }
#define SIMT_COMPARISON(T, op, name)                \
  inline bool operator op(const T& a, const T& b) { \
    return name(a, b);                              \
  }
#define SIMT_OPERATORS(T, add, sub, mul, div, neg, prefix, suffix, one) \
  SIMT_OPERATOR(T, +, add)                                              \
  SIMT_OPERATOR(T, -, sub)                                              \
  SIMT_OPERATOR(T, *, mul)                                              \
  SIMT_OPERATOR(T, /, div)                                              \
  SIMT_STEP(T, ++, add, one)                                            \
  SIMT_STEP(T, --, sub, one)                                            \
  SIMT_COMPARISON(T, ==, prefix##eq##suffix)                            \
  SIMT_COMPARISON(T, !=, prefix##neu##suffix)                           \
  SIMT_COMPARISON(T, <, prefix##lt##suffix)                             \
  SIMT_COMPARISON(T, <=, prefix##le##suffix)                            \
  SIMT_COMPARISON(T, >, prefix##gt##suffix)                             \
  SIMT_COMPARISON(T, >=, prefix##ge##suffix)                            \
  inline T operator+(const T& a) {                                      \
    return a;                                                           \
  }                                                                     \
  inline T operator-(const T& a) {                                      \
    return neg(a);                                                      \
  }
SIMT_OPERATORS(SIMT_T, __hadd, __hsub, __hmul, __hdiv, __hneg, __h, , SIMT_NARROW(1.0f))
SIMT_OPERATORS(SIMT_T2, __hadd2, __hsub2, __hmul2, __h2div, __hneg2, __hb, 2,
               SIMT_T2(SIMT_NARROW(1.0f), SIMT_NARROW(1.0f)))
#undef SIMT_OPERATOR
#undef SIMT_STEP
#undef SIMT_COMPARISON
#undef SIMT_OPERATORS

// ---- warp and memory ----

SIMT_SHUFFLES(SIMT_T)
SIMT_SHUFFLES(SIMT_T2)
SIMT_LOADS_AND_STORES(SIMT_T)
SIMT_LOADS_AND_STORES(SIMT_T2)
SIMT_ATOMIC(SIMT_T, atomicAdd, __hadd(old, value))
SIMT_ATOMIC(SIMT_T2, atomicAdd, __hadd2(old, value))

#undef SIMT_BITS
#undef SIMT_FROM_BITS
#undef SIMT_FLOAT
#undef SIMT_NARROW
