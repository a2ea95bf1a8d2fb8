// Binding of group_norm: tensors -> checks -> GroupNormParams -> the backend's kernel.
#include "ops/group_norm/group_norm.h"

#include <tuple>

#include "core/norm_binding.h"

namespace pvk::group_norm {
namespace {

// Whether the map is channels_last.
template <typename Params>
bool fill_size(Params& p, const char* op, const Tensor& input, int64_t groups) {
  PVK_CHECK(input.dim() >= 2 && input.numel() > 0, op,
            ": expected input to have at least 2 dimensions [N, C, ...] and not to be empty, but got ",
            shape_of(input));
  PVK_CHECK(groups >= 1 && input.size(1) % groups == 0, op, ": expected num_groups to divide ", input.size(1),
            " channels, but got ", groups);
  const bool channels_last = !input.is_contiguous() && is_channels_last(input);
  PVK_CHECK(channels_last || input.is_contiguous(), op,
            ": expected input to be contiguous or channels_last, but got size ", shape_of(input));
  p.dtype = p.weight_dtype = dtype_of(op, "input", input);
  p.N = input.size(0);
  p.C = input.size(1);
  p.G = groups;
  p.S = 1;
  for (int64_t i = 2; i < input.dim(); ++i) p.S *= input.size(i);
  p.rows = channels_last || p.S == 1;
  return channels_last;
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                                      const OptionalTensor& bias, int64_t groups, double eps, int64_t activation) {
  constexpr const char* kOp = "group_norm";
  const DeviceScope scope(input);
  GroupNormParams p{};
  const bool channels_last = fill_size(p, kOp, input, groups);
  if (residual) check_map(kOp, "residual", *residual, input, channels_last);
  PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kSigmoid), kOp,
            ": expected activation to be 0 to 6, but got ", activation);
  check_pair(kOp, "bias", weight, bias);
  p.weight = vector_of(kOp, "weight", weight, input, p.C, p.weight_dtype);
  p.bias = vector_of(kOp, "bias", bias, input, p.C, p.weight_dtype);
  const Tensor output = new_like(input);
  const Tensor stats = empty({2, p.N, p.G}, stats_dtype(input), input);
  p.input = data_of(input);
  p.residual = residual ? data_of(*residual) : nullptr;
  p.output = data_of(output);
  p.stats = data_of(stats);
  p.activation = Activation(activation);
  p.eps = eps;
  OptionalTensor scratch;
  if (const int64_t bytes = scratch_bytes(p); bytes > 0) {
    scratch = empty({bytes}, ScalarType::Byte, input);
    p.scratch = data_of(*scratch);
  }
  forward(p, scope.stream());
  return {output, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& input,
                                                       const OptionalTensor& output, const Tensor& stats,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       int64_t groups, int64_t activation, bool needs_input,
                                                       bool needs_residual, bool needs_weight, bool needs_bias) {
  constexpr const char* kOp = "_group_norm_backward";
  const DeviceScope scope(input);
  GroupNormBackwardParams p{};
  const bool channels_last = fill_size(p, kOp, input, groups);
  check_map(kOp, "grad", grad, input, channels_last);
  if (output) check_map(kOp, "output", *output, input, channels_last);
  PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kRelu6), kOp,
            ": expected activation to be 0 to 2, but got ", activation);
  PVK_CHECK(activation == 0 || output, kOp, ": expected output to be a Tensor beside an activation");
  PVK_CHECK(stats.dim() == 3 && stats.size(0) == 2 && stats.size(1) == p.N && stats.size(2) == p.G &&
                stats.is_contiguous() && stats.scalar_type() == stats_dtype(input),
            kOp, ": expected stats to be those of the forward, [2, ", p.N, ", ", p.G, "], but got ", shape_of(stats));
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
  p.grad = data_of(grad);
  p.input = data_of(input);
  p.output = activation != 0 ? data_of(*output) : nullptr;
  p.stats = data_of(stats);
  p.grad_input = needs_input ? data_of(grad_input) : nullptr;
  p.grad_residual = needs_residual ? data_of(grad_residual) : nullptr;
  p.grad_weight = needs_weight ? data_of(grad_weight) : nullptr;
  p.grad_bias = needs_bias ? data_of(grad_bias) : nullptr;
  p.activation = Activation(activation);
  OptionalTensor scratch;
  if (const int64_t bytes = scratch_bytes(p); bytes > 0) {
    scratch = empty({bytes}, ScalarType::Byte, input);
    p.scratch = data_of(*scratch);
  }
  backward(p, scope.stream());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace pvk::group_norm

PVK_LIBRARY_IMPL(m) {
  m.impl("group_norm", TORCH_BOX(&pvk::group_norm::forward_op));
  m.impl("_group_norm_backward", TORCH_BOX(&pvk::group_norm::backward_op));
}
