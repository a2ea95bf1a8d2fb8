// Binding of batch_norm: tensors -> checks -> BatchNormParams -> the backend's kernel.
#include "ops/batch_norm/batch_norm.h"

#include "core/norm_binding.h"

namespace pvk::batch_norm {
namespace {

OptionalTensor scratch_of(int64_t elements, const Tensor& like) {
  if (elements == 0) return std::nullopt;
  return empty({elements}, ScalarType::Double, like);
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                                      const OptionalTensor& bias, const OptionalTensor& running_mean,
                                      const OptionalTensor& running_var, bool training, double eps,
                                      int64_t activation) {
  constexpr const char* kOp = "batch_norm";
  const DeviceScope scope(input);
  BatchNormParams p{};
  p.rows = fill_map(p, kOp, input);
  fill_forward(p, kOp, input, p.rows, residual, weight, bias, activation);
  PVK_CHECK(training || (running_mean && running_var), kOp,
            ": expected running_mean and running_var to be Tensors when training is False");
  check_pair(kOp, "running_var", running_mean, running_var);
  p.running_dtype = p.dtype;
  if (!training) {
    p.running_mean = vector_of(kOp, "running_mean", running_mean, input, p.C, p.running_dtype);
    p.running_var = vector_of(kOp, "running_var", running_var, input, p.C, p.running_dtype);
  }
  const Tensor output = new_like(input);
  const Tensor stats = empty({3, p.C}, stats_dtype(input), input);
  const OptionalTensor partials = scratch_of(training ? partials_of(p.N * p.S, p.C) : 0, input);
  p.output = data_of(output);
  p.stats = data_of(stats);
  p.partials = partials ? data_of(*partials) : nullptr;
  p.training = training;
  p.eps = eps;
  forward(p, scope.stream());
  return {output, stats};
}

Gradients backward_op(const Tensor& grad, const Tensor& input, const OptionalTensor& output, const Tensor& stats,
                      const OptionalTensor& weight, const OptionalTensor& bias, bool training, int64_t activation,
                      bool needs_input, bool needs_residual, bool needs_weight, bool needs_bias) {
  constexpr const char* kOp = "_batch_norm_backward";
  const DeviceScope scope(input);
  BatchNormBackwardParams p{};
  p.rows = fill_map(p, kOp, input);
  PVK_CHECK(stats.dim() == 2 && stats.size(0) == 3 && stats.size(1) == p.C && stats.is_contiguous() &&
                stats.scalar_type() == stats_dtype(input),
            kOp, ": expected stats to be those of the forward, [3, ", p.C, "], but got ", shape_of(stats));
  const Gradients gradients = fill_backward(p, kOp, grad, input, p.rows, output, stats, weight, bias, activation,
                                            {needs_input, needs_residual, needs_weight, needs_bias});
  const OptionalTensor partials = scratch_of(partials_of(p.N * p.S, p.C), input);
  p.partials = partials ? data_of(*partials) : nullptr;
  p.training = training;
  backward(p, scope.stream());
  return gradients;
}

}  // namespace
}  // namespace pvk::batch_norm

PVK_LIBRARY_IMPL(m) {
  m.impl("batch_norm", TORCH_BOX(&pvk::batch_norm::forward_op));
  m.impl("_batch_norm_backward", TORCH_BOX(&pvk::batch_norm::backward_op));
}
