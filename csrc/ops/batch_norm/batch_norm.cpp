// Binding of batch_norm: tensors -> checks -> BatchNormParams -> the backend's kernel.
#include "ops/batch_norm/batch_norm.h"

#include <tuple>

#include "core/norm_binding.h"

namespace pvk::batch_norm {
namespace {

template <typename Params>
void fill_size(Params& p, const char* op, const Tensor& input) {
  PVK_CHECK(input.dim() >= 2 && input.numel() > 0, op,
            ": expected input to have at least 2 dimensions [N, C, ...] and not to be empty, but got ",
            shape_of(input));
  p.rows = !input.is_contiguous() && is_channels_last(input);
  PVK_CHECK(p.rows || input.is_contiguous(), op, ": expected input to be contiguous or channels_last, but got size ",
            shape_of(input));
  p.dtype = p.weight_dtype = dtype_of(op, "input", input);
  p.N = input.size(0);
  p.C = input.size(1);
  p.S = 1;
  for (int64_t i = 2; i < input.dim(); ++i) p.S *= input.size(i);
}

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
  fill_size(p, kOp, input);
  if (residual) check_map(kOp, "residual", *residual, input, p.rows);
  PVK_CHECK(training || (running_mean && running_var), kOp,
            ": expected running_mean and running_var to be Tensors when training is False");
  PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kSigmoid), kOp,
            ": expected activation to be 0 to 6, but got ", activation);
  check_pair(kOp, "bias", weight, bias);
  check_pair(kOp, "running_var", running_mean, running_var);
  p.running_dtype = p.dtype;
  p.weight = vector_of(kOp, "weight", weight, input, p.C, p.weight_dtype);
  p.bias = vector_of(kOp, "bias", bias, input, p.C, p.weight_dtype);
  if (!training) {
    p.running_mean = vector_of(kOp, "running_mean", running_mean, input, p.C, p.running_dtype);
    p.running_var = vector_of(kOp, "running_var", running_var, input, p.C, p.running_dtype);
  }
  const Tensor output = new_like(input);
  const Tensor stats = empty({3, p.C}, stats_dtype(input), input);
  const OptionalTensor partials = scratch_of(training ? partials_of(p.N * p.S, p.C) : 0, input);
  p.input = data_of(input);
  p.residual = residual ? data_of(*residual) : nullptr;
  p.output = data_of(output);
  p.stats = data_of(stats);
  p.partials = partials ? data_of(*partials) : nullptr;
  p.activation = Activation(activation);
  p.training = training;
  p.eps = eps;
  forward(p, scope.stream());
  return {output, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& input,
                                                       const OptionalTensor& output, const Tensor& stats,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       bool training, int64_t activation, bool needs_input,
                                                       bool needs_residual, bool needs_weight, bool needs_bias) {
  constexpr const char* kOp = "_batch_norm_backward";
  const DeviceScope scope(input);
  BatchNormBackwardParams p{};
  fill_size(p, kOp, input);
  check_map(kOp, "grad", grad, input, p.rows);
  if (output) check_map(kOp, "output", *output, input, p.rows);
  PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kRelu6), kOp,
            ": expected activation to be 0 to 2, but got ", activation);
  PVK_CHECK(activation == 0 || output, kOp, ": expected output to be a Tensor beside an activation");
  PVK_CHECK(stats.dim() == 2 && stats.size(0) == 3 && stats.size(1) == p.C && stats.is_contiguous() &&
                stats.scalar_type() == stats_dtype(input),
            kOp, ": expected stats to be those of the forward, [3, ", p.C, "], but got ", shape_of(stats));
  check_same_device(kOp, "stats", stats, "input", input);
  PVK_CHECK(weight || !needs_weight, kOp, ": expected weight to be a Tensor where its gradient is asked for");
  PVK_CHECK(bias || !needs_bias, kOp, ": expected bias to be a Tensor where its gradient is asked for");
  check_pair(kOp, "bias", weight, bias);
  p.weight = vector_of(kOp, "weight", weight, input, p.C, p.weight_dtype);
  vector_of(kOp, "bias", bias, input, p.C, p.weight_dtype);
  const auto made = [&](bool needed, const OptionalTensor& like, const Tensor& otherwise) {
    return needed ? new_like(like ? *like : otherwise) : empty({0}, input.scalar_type(), input);
  };
  const Tensor grad_input = made(needs_input, input, input), grad_residual = made(needs_residual, input, input);
  const Tensor grad_weight = made(needs_weight, weight, input), grad_bias = made(needs_bias, bias, input);
  const OptionalTensor partials = scratch_of(partials_of(p.N * p.S, p.C), input);
  p.grad = data_of(grad);
  p.input = data_of(input);
  p.output = activation != 0 ? data_of(*output) : nullptr;
  p.stats = data_of(stats);
  p.grad_input = needs_input ? data_of(grad_input) : nullptr;
  p.grad_residual = needs_residual ? data_of(grad_residual) : nullptr;
  p.grad_weight = needs_weight ? data_of(grad_weight) : nullptr;
  p.grad_bias = needs_bias ? data_of(grad_bias) : nullptr;
  p.partials = partials ? data_of(*partials) : nullptr;
  p.activation = Activation(activation);
  p.training = training;
  backward(p, scope.stream());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace pvk::batch_norm

PVK_LIBRARY_IMPL(m) {
  m.impl("batch_norm", TORCH_BOX(&pvk::batch_norm::forward_op));
  m.impl("_batch_norm_backward", TORCH_BOX(&pvk::batch_norm::backward_op));
}
