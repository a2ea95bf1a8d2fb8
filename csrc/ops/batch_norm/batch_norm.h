// Batch normalisation: parameters and backend interface.
//
// N images, C channels, S pixels: output = activation((x - mean[c]) * rstd[c] * weight[c] + bias[c] + residual), with
// the mean and the biased variance of the N * S values of a channel in training, else the running ones.
#pragma once

#include "core/activation.h"
#include "core/math.h"
#include "core/types.h"

namespace pvk::batch_norm {

// A map is dense: planes [N, C, S], or rows [N, S, C]. "opmath": double for float64, else float.
struct BatchNormParams {
  const void* input;
  const void* residual;      // or null
  const void* weight;        // [C] of weight_dtype, or null
  const void* bias;          // [C] of weight_dtype, or null
  const void* running_mean;  // [C] of running_dtype; null in training
  const void* running_var;   // the same
  void* output;
  void* stats;     // [3, C] of opmath: mean, rstd, unbiased variance (in training)
  void* partials;  // partials_of() of double, in training
  DType dtype;
  DType weight_dtype, running_dtype;  // dtype, or float32 beside a 16-bit dtype
  Activation activation;
  bool rows, training;
  int64_t N, C, S;
  double eps;
};

struct BatchNormBackwardParams {
  const void* grad;
  const void* input;
  const void* output;   // of the forward; null without an activation
  const void* stats;    // [3, C] of opmath
  const void* weight;   // [C], or null
  void* grad_input;     // or null
  void* grad_residual;  // what is before the activation; or null
  void* grad_weight;    // [C], or null
  void* grad_bias;      // [C], or null
  void* partials;       // partials_of() of double
  DType dtype, weight_dtype;
  Activation activation;  // none, relu or relu6
  bool rows, training;
  int64_t N, C, S;
};

// Parts of the N * S values of a channel whose sums are made apart, and then merged in order.
constexpr int64_t kElementsOfPart = 65536, kParts = 64;

inline int64_t parts_of(int64_t values, int64_t channels) {
  return max_of(min_of(min_of(values * channels / kElementsOfPart, values), kParts), int64_t(1));
}

// Backend interface. Nothing is empty.
void forward(const BatchNormParams& params, Stream stream);
void backward(const BatchNormBackwardParams& params, Stream stream);
int64_t partials_of(int64_t values, int64_t channels);  // elements of scratch, for N * S values a channel

}  // namespace pvk::batch_norm
