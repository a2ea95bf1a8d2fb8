// Rounding to integers and to narrower floats, in the four directions of the _rn, _rz, _rd and _ru intrinsics.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace simt {

enum class Round { kNearest, kZero, kDown, kUp };

inline double round_integral(double x, Round round) {
  switch (round) {
    case Round::kNearest:
      return std::nearbyint(x);
    case Round::kZero:
      return std::trunc(x);
    case Round::kDown:
      return std::floor(x);
    case Round::kUp:
      return std::ceil(x);
  }
  return x;
}

// Saturates. NaN becomes 0, or the top bit alone where the source is double or the result has 64 bits.
template <typename Int>
inline Int to_integer(double x, Round round, bool from_double) {
  using Limits = std::numeric_limits<Int>;
  constexpr Int kTopBit = Int(uint64_t(1) << (sizeof(Int) * 8 - 1));
  if (x != x) return from_double || sizeof(Int) == 8 ? kTopBit : Int(0);
  const double whole = round_integral(x, round);
  if (whole < double(Limits::min())) return Limits::min();
  // The bound is one above the maximum, a power of two.
  if (whole >= 2.0 * double(Int(Limits::max() / 2 + 1))) return Limits::max();
  return Int(whole);
}

// The direction in which `exact` is from its nearest double `near`: the sign of exact - near.
// Moves it so that a later rounding to fewer bits is as if it were of the exact value.
inline double make_odd(double near, int direction) {
  if (direction == 0) return near;
  uint64_t bits = std::bit_cast<uint64_t>(near);
  if ((bits & 1) != 0) return near;
  if (near == 0)
    return direction > 0 ? std::numeric_limits<double>::denorm_min() : -std::numeric_limits<double>::denorm_min();
  const bool grows = (direction > 0) == (near > 0);
  return std::bit_cast<double>(grows ? bits + 1 : bits - 1);
}

template <typename Int>
inline double odd_double(Int x) {
  const double near = double(x);
  const __int128 error = __int128(x) - __int128(near);
  return make_odd(near, error > 0 ? 1 : error < 0 ? -1 : 0);
}

// a * b + c, to odd; a * b is exact in double.
inline double odd_fma(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  if (sum - sum != 0) return sum;
  const double part = sum - product;
  const double error = (product - (sum - part)) + (c - part);
  return make_odd(sum, error > 0 ? 1 : error < 0 ? -1 : 0);
}

// To the bits of a float of kExponent and kMantissa bits. NaN is 0x7fff for the formats of 16 bits, as CUDA has it.
template <int kExponent, int kMantissa>
inline uint32_t narrow(double x, Round round = Round::kNearest) {
  constexpr int kLeast = 2 - (1 << (kExponent - 1));  // the exponent of the smallest normal number
  constexpr uint32_t kInfinity = ((1u << kExponent) - 1) << kMantissa, kSign = 1u << (kExponent + kMantissa);
  const uint64_t bits = std::bit_cast<uint64_t>(x), magnitude = bits & ~(uint64_t(1) << 63);
  const bool negative = bits >> 63 != 0;
  const uint32_t sign = negative ? kSign : 0;
  if (magnitude > 0x7ff0000000000000u) return kSign - 1;
  if (magnitude == 0x7ff0000000000000u) return sign | kInfinity;
  if (magnitude == 0) return sign;

  // A subnormal double is far below half of the smallest result; its exponent needs not be right.
  int exponent = int(magnitude >> 52) - 1023;
  const uint64_t mantissa = (magnitude & 0x000fffffffffffffu) | uint64_t(1) << 52;
  int shift = 52 - kMantissa;
  if (exponent < kLeast) {
    shift += kLeast - exponent;
    if (shift > 62) shift = 62;
    exponent = kLeast;
  }
  const uint64_t rest = mantissa & ((uint64_t(1) << shift) - 1), half = uint64_t(1) << (shift - 1);
  uint64_t kept = mantissa >> shift;
  switch (round) {
    case Round::kNearest:
      kept += rest > half || (rest == half && (kept & 1) != 0);
      break;
    case Round::kZero:
      break;
    case Round::kDown:
      kept += negative && rest != 0;
      break;
    case Round::kUp:
      kept += !negative && rest != 0;
      break;
  }
  const uint64_t result = (uint64_t(exponent - kLeast) << kMantissa) + kept;
  if (result < kInfinity) return sign | uint32_t(result);
  const bool to_infinity = round == Round::kNearest || round == (negative ? Round::kDown : Round::kUp);
  return sign | (to_infinity ? kInfinity : kInfinity - 1);
}

}  // namespace simt
