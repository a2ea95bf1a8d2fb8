// The CUDA kernels of attention that have files of their own, by dtype, and how many features they are compiled for.
#pragma once

#include "core/math.h"
#include "ops/attention/attention.h"

namespace pvk::attention {

// body.operator()<FEATURES>() with the least number that D and E fit into.
template <int FIRST, int... MORE, typename Body>
auto dispatch_among(const AttentionParams& p, const Body& body) {
  if constexpr (sizeof...(MORE) > 0) {
    if (max_of(p.D, p.E) > FIRST) return dispatch_among<MORE...>(p, body);
  }
  return body.template operator()<FIRST>();
}
template <typename scalar_t, typename Body>
auto dispatch_features(const AttentionParams& p, const Body& body) {
  if constexpr (sizeof(scalar_t) == 2) {
    return dispatch_among<16, 32, 48, 64, 80, 96, 128, 160, 192, 256>(p, body);
  } else {
    return dispatch_among<16, 32, 64, 80, 128, 256>(p, body);
  }
}

struct BackwardCall {
  AttentionBackwardParams params;
  const void* delta;      // [B, H, L] of opmath
  const uint8_t* absent;  // of absent_bytes()
  void* partials;         // [parts, bias's elements] of opmath, where parts > 1
  int64_t parts;          // that each tile of grad_bias's sum is split into
};

template <typename scalar_t>
struct Kernels {
  static void forward(const AttentionParams& params, Stream stream);
  static void backward(const BackwardCall& call, Stream stream);  // of query, key and value
  static int64_t bias_parts(const AttentionBackwardParams& params);
  static void backward_bias(const BackwardCall& call, Stream stream);
};

}  // namespace pvk::attention
