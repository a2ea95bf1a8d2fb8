// Group normalisation: parameters and backend interface.
//
// N samples, C channels in G groups of neighbours, S pixels:
// output = activation((x - mean[n, g]) * rstd[n, g] * weight[c] + bias[c] + residual), with the mean and the biased
// variance of the C / G * S values of a group of a sample.
#pragma once

#include "core/activation.h"
#include "core/math.h"
#include "core/types.h"

namespace pvk::group_norm {

// A map is dense: planes [N, C, S], or rows [N, S, C]. "opmath": double for float64, else float.
struct GroupNormParams {
  const void* input;
  const void* residual;  // or null
  const void* weight;    // [C] of weight_dtype, or null
  const void* bias;      // [C] of weight_dtype, or null
  void* output;
  void* stats;    // [2, N, G] of opmath: mean, rstd
  void* scratch;  // scratch_bytes(params) bytes on the device
  DType dtype;
  DType weight_dtype;  // dtype, or float32 beside a 16-bit dtype
  Activation activation;
  bool rows;
  int64_t N, C, S, G;
  double eps;
};

struct GroupNormBackwardParams {
  const void* grad;
  const void* input;
  const void* output;   // of the forward; null without an activation
  const void* stats;    // [2, N, G] of opmath
  const void* weight;   // [C], or null
  void* grad_input;     // or null
  void* grad_residual;  // what is before the activation; or null
  void* grad_weight;    // [C], or null
  void* grad_bias;      // [C], or null
  void* scratch;        // scratch_bytes(params) bytes on the device
  DType dtype, weight_dtype;
  Activation activation;  // none, relu or relu6
  bool rows;
  int64_t N, C, S, G;
};

// Parts whose sums are made apart and then merged in order, of the `count` pixels or values of a map of `elements`.
constexpr int64_t kElementsOfPart = 65536, kParts = 64;

inline int64_t parts_of(int64_t count, int64_t elements) {
  return max_of(min_of(min_of(elements / kElementsOfPart, count), kParts), int64_t(1));
}

// Backend interface. Nothing is empty; G divides C. `scratch_bytes` is asked with the sizes and the dtype set.
int64_t scratch_bytes(const GroupNormParams& params);
int64_t scratch_bytes(const GroupNormBackwardParams& params);
void forward(const GroupNormParams& params, Stream stream);
void backward(const GroupNormBackwardParams& params, Stream stream);

}  // namespace pvk::group_norm
