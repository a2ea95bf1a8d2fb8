// Layer normalisation: parameters and backend interface.
//
// M rows of N features: output[m, n] = (x[m, n] - mean[m]) * rstd[m] * weight[n] + bias[n] with x = input, or
// input + residual rounded to dtype; rstd = 1 / sqrt(variance + eps), the variance that of the row (biased).
#pragma once

#include "core/math.h"
#include "core/types.h"

namespace pvk::layer_norm {

// Everything is contiguous. "opmath": double for float64, else float.
struct LayerNormParams {
  const void* input;     // [M, N]
  const void* residual;  // [M, N], or null
  const void* weight;    // [N] of weight_dtype, or null
  const void* bias;      // [N] of weight_dtype, or null
  void* output;          // [M, N]
  void* sum;             // [M, N]: input + residual; null without a residual
  void* stats;           // [2, M] of opmath: mean, rstd
  DType dtype;
  DType weight_dtype;  // dtype, or float32 beside a 16-bit dtype
  int64_t M, N;
  double eps;
};

struct LayerNormBackwardParams {
  const void* grad;      // [M, N]
  const void* grad_sum;  // [M, N]: added to the gradient of the input; or null
  const void* input;     // [M, N]: what was normalised
  const void* stats;     // [2, M] of opmath
  const void* weight;    // [N], or null
  void* grad_input;      // [M, N], or null
  void* grad_weight;     // [N], or null
  void* grad_bias;       // [N], or null
  void* partials;        // [parts_of(M), 2, N] of opmath, where a gradient of the weight or the bias is asked for
  DType dtype, weight_dtype;
  int64_t M, N;
};

// Parts of the rows whose sums are made apart, and then added in order.
constexpr int64_t kRowsOfPart = 32, kParts = 64;

inline int64_t parts_of(int64_t M) {
  return min_of(ceil_div(M, kRowsOfPart), kParts);
}

// Backend interface. N is positive; M is too, or 0 in backward().
void forward(const LayerNormParams& params, Stream stream);
void backward(const LayerNormBackwardParams& params, Stream stream);

}  // namespace pvk::layer_norm
