// Softmax cross entropy: parameters, backend interface, and the formulas that every backend shares.
//
// Of P positions with C logits x each: log p_c = (x_c - max) - log(sum over c of exp(x_c - max)), and
//   loss = - sum over c of q_c log p_c,   d loss / d x_c = p_c * (sum of q) - q_c,
// where q is what the target asks for. A label y: q_c = weight_c * ((1 - smoothing) * [c == y] + smoothing / C), and
// all zero where y is ignored. Probabilities t: q_c = weight_c * ((1 - smoothing) * t_c + smoothing / C). A mean
// divides by the sum of weight_y over labels that are not ignored, or by P. Source: torch.nn.functional.cross_entropy.
#pragma once

#include "core/math.h"
#include "core/types.h"

namespace pvk::softmax_cross_entropy {

enum class Reduction : int64_t { kNone, kMean, kSum };  // torch's numbers

constexpr int64_t kParts = 1024;  // of the positions, at most, whose sums are made apart and then added in order

// Logits lie [N, C, S], or [N, S, C]: P = N * S positions. "opmath": double for float64, else float.
struct SoftmaxCrossEntropyParams {
  const void* input;   // logits
  const void* target;  // [P], int64 labels; or probabilities, as the logits lie
  const void* weight;  // [C] of weight_dtype, or null: ones
  void* loss;          // forward: [P] of loss_dtype, or [1] of a reduction
  void* stats;         // [2 * P + 1] of opmath, written by the forward: max; log of the sum; a mean's divisor
  double* partials;    // forward: [kParts, 2]: sums of losses, of weights
  const void* grad;    // backward: [P] of loss_dtype, or [1] of a reduction
  void* grad_input;    // backward: as the logits lie, or null
  void* grad_target;   // backward, of probabilities: as the logits lie, or null
  DType dtype, weight_dtype;
  DType loss_dtype;  // dtype, or float32 of a 16-bit dtype
  Reduction reduction;
  bool is_soft;  // the target is probabilities
  bool classes_last;
  int64_t N, C, S;  // C is positive
  int64_t ignore_index;
  double smoothing;  // in [0, 1]
};

// Backend interface. The forward returns the first position with a label that is no class, -1 where there is none; on
// CUDA, where that is not seen, its loss and its gradient are NaN.
int64_t forward(const SoftmaxCrossEntropyParams& params, Stream stream);
void backward(const SoftmaxCrossEntropyParams& params, Stream stream);

}  // namespace pvk::softmax_cross_entropy
