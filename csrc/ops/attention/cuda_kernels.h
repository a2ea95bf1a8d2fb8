// The CUDA kernels of attention that have files of their own, by dtype, and how many features they are compiled for.
#pragma once

#include "core/math.h"
#include "ops/attention/attention.h"

namespace pvk::attention {

// What a kernel is compiled with: each costs registers.
constexpr int kPlain = 0, kBiased = 1, kDropped = 2;  // nothing; a bias, or none; that and dropout

// body.operator()<FEATURES, EXTRAS>() with the least number of features that D and E fit into.
template <int EXTRAS, int FIRST, int... MORE, typename Body>
auto dispatch_among(const AttentionParams& p, const Body& body) {
  if constexpr (sizeof...(MORE) > 0) {
    if (max_of(p.D, p.E) > FIRST) return dispatch_among<EXTRAS, MORE...>(p, body);
  }
  return body.template operator()<FIRST, EXTRAS>();
}
template <typename Body>
auto dispatch_biased(const AttentionParams& p, const Body& body) {
  if (p.seed != nullptr) return dispatch_among<kDropped, 64, 256>(p, body);
  return dispatch_among<kBiased, 32, 64, 128, 256>(p, body);
}
template <typename scalar_t, typename Body>
auto dispatch_features(const AttentionParams& p, const Body& body) {
  if constexpr (sizeof(scalar_t) == 2) {
    if (p.bias == nullptr && p.seed == nullptr) return dispatch_among<kPlain, 32, 64, 80, 96, 128, 256>(p, body);
  }
  return dispatch_biased(p, body);
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
  static void backward_query(const BackwardCall& call, Stream stream);
  static void backward_key(const BackwardCall& call, Stream stream);  // and value
  static int64_t bias_parts(const AttentionBackwardParams& params);
  static void backward_bias(const BackwardCall& call, Stream stream);
};

}  // namespace pvk::attention
