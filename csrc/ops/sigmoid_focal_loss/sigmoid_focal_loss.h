// Sigmoid focal loss: parameters, backend interface, and the formulas that every backend shares.
//
// x: logits, t: targets. Source: Lin et al., "Focal Loss for Dense Object Detection", 2017.
#pragma once

#include "core/math.h"
#include "core/types.h"

namespace pvk::sigmoid_focal_loss {

enum class Reduction : int64_t { kNone, kMean, kSum };  // torch's numbers

constexpr int64_t kPartials = 1024;  // sums of parts that a reduction has at most

struct SigmoidFocalLossParams {
  const void* inputs;   // [count]
  const void* targets;  // [count]
  void* loss;           // forward: [count], or [1] of a reduction
  const void* grad;     // backward: [count], or [1] where grad_is_single
  void* grad_inputs;    // backward: [count], or nullptr
  void* grad_targets;   // backward: [count], or nullptr
  double* partials;     // forward: kPartials, of a reduction
  DType dtype;
  Reduction reduction;
  bool grad_is_single;
  int64_t count;
  double alpha, gamma;  // alpha < 0: no weight
};

// Backend interface.
void forward(const SigmoidFocalLossParams& params, Stream stream);
void backward(const SigmoidFocalLossParams& params, Stream stream);

// 2 gamma where m^gamma is a few products and at most a root; -1 where it takes exp and log.
inline int half_powers(double gamma) {
  return gamma >= 0 && gamma <= 32 && 2 * gamma == double(int(2 * gamma)) ? int(2 * gamma) : -1;
}

// ---- formulas: V is a scalar, or a register of them; T its element ----

// What the loss and its gradients are made of. With a the target of the less likely class (1 - t for x >= 0, else t),
// e = exp(-|x|), the likely class has probability 1 / (1 + e), and nothing cancels:
//   cross entropy = |x| a + log(1 + e),   missed = 1 - p_t = (a + e (1 - a)) / (1 + e).
template <typename V, typename T>
struct FocalTerms {
  V x, away, magnitude, larger, smaller, cross_entropy, missed, weight;

  PVK_HOST_DEVICE FocalTerms(V logit, V target, V abs_logit, V e, V log1p_e, T alpha) {
    x = logit;
    magnitude = abs_logit;
    away = x >= T(0) ? T(1) - target : target;
    larger = T(1) / (e + T(1));
    smaller = e * larger;
    cross_entropy = magnitude * away + log1p_e;
    missed = larger * (away + e * (T(1) - away));
    weight = alpha >= T(0) ? alpha * target + (T(1) - alpha) * (T(1) - target) : target - target + T(1);
  }

  // power: missed^gamma.
  PVK_HOST_DEVICE V loss(V power) const { return weight * cross_entropy * power; }

  // less: gamma * missed^(gamma - 1), 0 where missed is 0.
  PVK_HOST_DEVICE V by_input(V power, V less) const {
    const V slope =
        weight * (power * (away - smaller) + less * (smaller * larger) * (away + away - T(1)) * cross_entropy);
    return x >= T(0) ? slope : -slope;
  }

  PVK_HOST_DEVICE V by_target(V power, V less, T alpha) const {
    const V turned = less * (smaller - larger) * cross_entropy;
    const V slope = weight * ((x >= T(0) ? turned : -turned) - x * power);
    return alpha >= T(0) ? slope + (alpha + alpha - T(1)) * power * cross_entropy : slope;
  }
};

}  // namespace pvk::sigmoid_focal_loss
