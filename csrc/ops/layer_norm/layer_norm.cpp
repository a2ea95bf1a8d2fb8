// Binding of layer_norm: tensors -> checks -> LayerNormParams -> the backend's kernel.
#include "ops/layer_norm/layer_norm.h"

#include <optional>
#include <tuple>

#include "core/binding.h"

namespace pvk::layer_norm {
namespace {

using OptionalTensor = std::optional<Tensor>;

ScalarType stats_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The product of the last `dims` sizes, and of the others.
void split(const char* op, const Tensor& input, int64_t dims, int64_t& M, int64_t& N) {
  PVK_CHECK(dims >= 1 && dims <= input.dim(), op, ": expected dims to be 1 to ", input.dim(), ", but got ", dims);
  M = N = 1;
  for (int64_t i = 0; i < input.dim(); ++i) (i < input.dim() - dims ? M : N) *= input.size(i);
}

bool same_size(const Tensor& one, const Tensor& other) {
  if (one.dim() != other.dim()) return false;
  for (int64_t i = 0; i < one.dim(); ++i)
    if (one.size(i) != other.size(i)) return false;
  return true;
}

void check_map(const char* op, const char* argument, const Tensor& tensor, const Tensor& input) {
  PVK_CHECK(same_size(tensor, input), op, ": expected ", argument, " to have size ", shape_of(input), ", but got ",
            shape_of(tensor));
  PVK_CHECK(tensor.is_contiguous(), op, ": expected ", argument, " to be contiguous, but got size ", shape_of(tensor));
  PVK_CHECK(tensor.scalar_type() == input.scalar_type(), op, ": expected ", argument, " to be ", input.scalar_type(),
            " as input is, but got ", tensor.scalar_type());
  check_same_device(op, argument, tensor, "input", input);
}

void check_vector(const char* op, const char* argument, const Tensor& vector, const Tensor& input, int64_t N) {
  PVK_CHECK(vector.numel() == N, op, ": expected ", argument, " to have ", N, " elements, but got ", shape_of(vector));
  PVK_CHECK(vector.is_contiguous(), op, ": expected ", argument, " to be contiguous, but got size ", shape_of(vector));
  PVK_CHECK(vector.scalar_type() == input.scalar_type() ||
                (vector.scalar_type() == ScalarType::Float && input.scalar_type() != ScalarType::Double),
            op, ": expected ", argument, " to be ", input.scalar_type(),
            " as input is, or float32 beside a 16-bit input, but got ", vector.scalar_type());
  check_same_device(op, argument, vector, "input", input);
}

Tensor new_like(const Tensor& tensor) {
  const Tensor result = torch::stable::empty_like(tensor);
#if !defined(PVK_CUDA)
  advise_huge_pages(result.data_ptr(), result.numel() * int64_t(result.element_size()));
#endif
  return result;
}

std::tuple<Tensor, Tensor, Tensor> forward_op(const Tensor& input, const OptionalTensor& residual,
                                              const OptionalTensor& weight, const OptionalTensor& bias, int64_t dims,
                                              double eps) {
  constexpr const char* kOp = "layer_norm";
  LayerNormParams p{};
  split(kOp, input, dims, p.M, p.N);
  check_map(kOp, "input", input, input);
  if (residual) check_map(kOp, "residual", *residual, input);
  if (weight) check_vector(kOp, "weight", *weight, input, p.N);
  if (bias) check_vector(kOp, "bias", *bias, input, p.N);
  PVK_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(), kOp,
            ": expected bias to have the dtype of weight, but got ", bias->scalar_type());
  const DeviceScope scope(input);
  p.dtype = p.weight_dtype = dtype_of(kOp, "input", input);
  const Tensor output = new_like(input);
  const Tensor sum = residual ? new_like(input) : empty({0}, input.scalar_type(), input);
  const Tensor stats = empty({2, p.M}, stats_dtype(input), input);
  if (input.numel() == 0) return {output, sum, stats};
  p.input = data_of(input);
  p.output = data_of(output);
  p.stats = data_of(stats);
  if (residual) {
    p.residual = data_of(*residual);
    p.sum = data_of(sum);
  }
  if (weight) {
    p.weight = data_of(*weight);
    p.weight_dtype = dtype_of(kOp, "weight", *weight);
  }
  if (bias) {
    p.bias = data_of(*bias);
    p.weight_dtype = dtype_of(kOp, "bias", *bias);
  }
  p.eps = eps;
  forward(p, scope.stream());
  return {output, sum, stats};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& input,
                                               const Tensor& stats, const OptionalTensor& weight,
                                               const OptionalTensor& bias, int64_t dims, bool needs_input,
                                               bool needs_weight, bool needs_bias) {
  constexpr const char* kOp = "_layer_norm_backward";
  LayerNormBackwardParams p{};
  split(kOp, input, dims, p.M, p.N);
  check_map(kOp, "input", input, input);
  check_map(kOp, "grad", grad, input);
  if (grad_sum) check_map(kOp, "grad_sum", *grad_sum, input);
  PVK_CHECK(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == p.M && stats.is_contiguous() &&
                stats.scalar_type() == stats_dtype(input),
            kOp, ": expected stats to be those of the forward, [2, ", p.M, "], but got ", shape_of(stats));
  check_same_device(kOp, "stats", stats, "input", input);
  if (weight) check_vector(kOp, "weight", *weight, input, p.N);
  if (bias) check_vector(kOp, "bias", *bias, input, p.N);
  PVK_CHECK(weight || !needs_weight, kOp, ": expected weight to be a Tensor where its gradient is asked for");
  PVK_CHECK(bias || !needs_bias, kOp, ": expected bias to be a Tensor where its gradient is asked for");
  PVK_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(), kOp,
            ": expected bias to have the dtype of weight, but got ", bias->scalar_type());
  const DeviceScope scope(input);
  p.dtype = p.weight_dtype = dtype_of(kOp, "input", input);
  const auto vector = [&](bool needed, const OptionalTensor& like) {
    return needed ? new_like(*like) : empty({0}, input.scalar_type(), input);
  };
  const Tensor grad_input = needs_input ? new_like(input) : empty({0}, input.scalar_type(), input);
  const Tensor grad_weight = vector(needs_weight, weight), grad_bias = vector(needs_bias, bias);
  if (weight) {
    p.weight = data_of(*weight);
    p.weight_dtype = dtype_of(kOp, "weight", *weight);
  }
  if (bias) p.weight_dtype = dtype_of(kOp, "bias", *bias);
  if (p.N == 0) return {grad_input, grad_weight, grad_bias};
  const Tensor partials = empty({needs_weight || needs_bias ? parts_of(p.M) : 0, 2, p.N}, stats_dtype(input), input);
  p.grad = data_of(grad);
  p.grad_sum = grad_sum ? data_of(*grad_sum) : nullptr;
  p.input = data_of(input);
  p.stats = data_of(stats);
  p.grad_input = needs_input ? data_of(grad_input) : nullptr;
  p.grad_weight = needs_weight ? data_of(grad_weight) : nullptr;
  p.grad_bias = needs_bias ? data_of(grad_bias) : nullptr;
  p.partials = needs_weight || needs_bias ? data_of(partials) : nullptr;
  backward(p, scope.stream());
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace pvk::layer_norm

PVK_LIBRARY_IMPL(m) {
  m.impl("layer_norm", TORCH_BOX(&pvk::layer_norm::forward_op));
  m.impl("_layer_norm_backward", TORCH_BOX(&pvk::layer_norm::backward_op));
}
