// The CUDA kernels of attention that have files of their own, by dtype, and how many features they are compiled for.
#pragma once

#include "core/math.h"
#include "ops/attention/attention.h"

namespace pvk::attention {

// body.operator()<FEATURES>() with the least number that D and E fit into.
template <int FIRST, int... MORE, typename Body>
void dispatch_features(const AttentionParams& p, const Body& body) {
  if constexpr (sizeof...(MORE) > 0) {
    if (max_of(p.D, p.E) > FIRST) return dispatch_features<MORE...>(p, body);
  }
  body.template operator()<FIRST>();
}
template <typename Body>
void dispatch_half(const AttentionParams& p, const Body& body) {
  dispatch_features<16, 32, 48, 64, 80, 96, 128, 160, 192, 256>(p, body);
}
template <typename Body>
void dispatch_wide(const AttentionParams& p, const Body& body) {
  dispatch_features<16, 32, 64, 80, 128, 256>(p, body);
}

void forward_float16(const AttentionParams& params, Stream stream);
void forward_bfloat16(const AttentionParams& params, Stream stream);
void forward_float32(const AttentionParams& params, Stream stream);
void forward_float64(const AttentionParams& params, Stream stream);

}  // namespace pvk::attention
