// Stands in for CUDA's header of this name: __nv_bfloat16, __nv_bfloat162 and their intrinsics.
#pragma once

#include <cuda_fp16.h>

namespace simt {

struct BFloat16 {
  static constexpr uint16_t kInfinity = 0x7f80;

  static uint16_t from(double x, Round round = Round::kNearest) { return uint16_t(narrow<8, 7>(x, round)); }

  static uint16_t from(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }

  static float to_float(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }
};

}  // namespace simt

#define SIMT_T __nv_bfloat16
#define SIMT_T2 __nv_bfloat162
#define SIMT_RAW __nv_bfloat16_raw
#define SIMT_RAW2 __nv_bfloat162_raw
#define SIMT_OTHER __half
#define SIMT_FORMAT simt::BFloat16
#define SIMT_NAME(before, after) before##bfloat16##after
#define SIMT_NAME2(before, after) before##bfloat162##after
#define SIMT_SPREAD __bfloat162bfloat162

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

inline __half::__half(__nv_bfloat16 x) : __half(__bfloat162float(x)) {}
inline __nv_bfloat16::__nv_bfloat16(__half x) : __nv_bfloat16(__half2float(x)) {}

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
