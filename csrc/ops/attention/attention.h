// Fused attention: parameters and backend interface.
//
// B batches of H query heads and G key heads (H a multiple of G: head h reads key head h / (H / G)), L queries, S keys,
// D features of queries and keys, E of values. Of each query i of a head:
//   score[j]  = scale * dot(query[i], key[j]) + bias[i, j], or -infinity where the key is masked for the query
//   lse       = log(sum_j exp(score[j])), weight[j] = exp(score[j] - lse); all 0 where every score is -infinity
//   output[i] = sum_j kept[i, j] * weight[j] * value[j]
// A key is masked for a query outside of its window (i - left <= j <= i + right), where the bias is false or -infinity,
// and beyond key_lengths. A key that is masked for every query of a head is absent: neither its key nor its value is
// looked at, whatever they hold, and its gradients are 0.
#pragma once

#include "core/math.h"
#include "core/philox.h"
#include "core/types.h"

namespace pvk::attention {

constexpr int64_t kMaxFeatures = 256;

enum class BiasKind : int32_t { kNone, kBool, kAdded, kAddedFloat };  // added: of dtype; or float32 beside 16 bits

// Strides are in elements; the last one of query, key, value, output and their gradients is 1. "opmath": double for
// float64, else float.
struct AttentionParams {
  const void* query;           // [B, H, L, D]
  const void* key;             // [B, G, S, D]
  const void* value;           // [B, G, S, E]
  const void* bias;            // [B, H, L, S] through bias_stride, which is 0 where it is broadcast; or null
  const int64_t* key_lengths;  // [B], clamped to 0..S by the kernel; or null
  const int64_t* seed;         // [1], of dropout; or null
  void* output;                // [B, H, L, E]
  void* lse;                   // [B, H, L] of opmath, contiguous; -infinity where every score is
  void* scratch;               // forward_scratch() bytes
  DType dtype;
  BiasKind bias_kind;
  int64_t B, H, G, L, S, D, E;
  int64_t query_stride[3], key_stride[3], value_stride[3], output_stride[3];
  int64_t bias_stride[4];
  double scale;
  int64_t left, right;  // S + L where the window has no such end
  double dropout_p;     // in [0, 1); weights that are kept are divided by 1 - dropout_p
};

struct AttentionBackwardParams {
  AttentionParams forward;  // output and lse are read; its scratch is not used
  const void* grad_output;  // [B, H, L, E]
  const void* grad_lse;     // [B, H, L] of opmath, contiguous, or null
  void* grad_query;         // [B, H, L, D]
  void* grad_key;           // [B, G, S, D]
  void* grad_value;         // [B, G, S, E]
  void* grad_bias;          // [bias_size], contiguous, of the bias's dtype; or null
  void* scratch;            // backward_scratch() bytes
  int64_t grad_output_stride[3], grad_query_stride[3], grad_key_stride[3], grad_value_stride[3];
  int64_t bias_size[4];  // of B, H, L, S, or 1
};

// Whether dropout keeps the weight of key j for query i: all backends and the reference draw the same.
PVK_HOST_DEVICE uint32_t dropout_threshold(double dropout_p) {
  return uint32_t(dropout_p * 4294967296.0);
}
PVK_HOST_DEVICE uint64_t dropout_index(const AttentionParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  return uint64_t(((b * p.H + h) * p.L + i) * p.S + j);
}
PVK_HOST_DEVICE bool dropout_keeps(uint64_t seed, uint64_t index, uint32_t threshold) {
  uint32_t words[4];
  philox(seed, index / 4, words);
  return words[index % 4] >= threshold;
}

// Backend interface. B, H, G and L are positive, and S, D and E too; sizes fit: H % G == 0, D and E at most
// kMaxFeatures.
int64_t forward_scratch(const AttentionParams& params);
int64_t backward_scratch(const AttentionBackwardParams& params);
void forward(const AttentionParams& params, Stream stream);
void backward(const AttentionBackwardParams& params, Stream stream);

}  // namespace pvk::attention
