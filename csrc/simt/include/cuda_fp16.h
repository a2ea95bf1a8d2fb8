// Stands in for CUDA's header of this name: __half, __half2 and their intrinsics.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

#include "simt/rounding.h"

namespace simt {

struct Float16 {
  static constexpr uint16_t kInfinity = 0x7c00;

  static uint16_t from(double x, Round round = Round::kNearest) { return uint16_t(narrow<5, 10>(x, round)); }

  static uint16_t from(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00;
    if (magnitude >= 0x38800000u) return sign | uint16_t((magnitude - 0x37fff001u + (magnitude >> 13 & 1)) >> 13);
    // Subnormal: the sum has the result in its last bits.
    return sign | uint16_t(std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f));
  }

  static float to_float(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    if (magnitude > 0x7c00) return std::bit_cast<float>(0x7fffffffu);
    if (magnitude == 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u);
    if (magnitude >= 0x0400) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
    const float subnormal = float(magnitude) * 0x1p-24f;
    return sign == 0 ? subnormal : -subnormal;
  }
};

}  // namespace simt

struct __nv_bfloat16;

#define SIMT_T __half
#define SIMT_T2 __half2
#define SIMT_RAW __half_raw
#define SIMT_RAW2 __half2_raw
#define SIMT_OTHER __nv_bfloat16
#define SIMT_FORMAT simt::Float16
#define SIMT_NAME(before, after) before##half##after
#define SIMT_NAME2(before, after) before##half2##after
#define SIMT_SPREAD __half2half2

#include "simt/narrow_type.h"

#include "simt/narrow_intrinsics.h"

#undef SIMT_T
#undef SIMT_T2
#undef SIMT_RAW
#undef SIMT_RAW2
#undef SIMT_OTHER
#undef SIMT_FORMAT
#undef SIMT_NAME
#undef SIMT_SPREAD
#undef SIMT_NAME2

using half = __half;
using half2 = __half2;
using nv_half = __half;
using nv_half2 = __half2;
