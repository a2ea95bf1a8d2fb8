// Binding of softmax_cross_entropy: tensors -> checks -> SoftmaxCrossEntropyParams -> the backend's kernel.
#include "ops/softmax_cross_entropy/softmax_cross_entropy.h"

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "core/binding.h"

namespace pvk::softmax_cross_entropy {
namespace {

using Optional = std::optional<Tensor>;

// Of [N, C, ...]: whether the classes of a position are neighbours, and the positions follow each other in order.
bool has_classes_last(const Tensor& tensor) {
  int64_t step = tensor.dim() > 1 ? tensor.size(1) : 1;
  if (tensor.dim() > 1 && tensor.size(1) > 1 && tensor.stride(1) != 1) return false;
  for (int64_t i = tensor.dim(); i-- > 0;) {
    if (i == 1) continue;
    if (tensor.size(i) > 1 && tensor.stride(i) != step) return false;
    step *= tensor.size(i);
  }
  return true;
}

SoftmaxCrossEntropyParams make_params(const char* op, const Tensor& input, const Tensor& target, const Optional& weight,
                                      int64_t ignore_index, int64_t reduction, double smoothing) {
  SoftmaxCrossEntropyParams p{};
  p.dtype = dtype_of(op, "input", input);
  PVK_CHECK(input.dim() >= 1, op, ": expected input to have dimensions [C], [N, C] or [N, C, ...], but got ",
            shape_of(input));
  const int64_t class_dim = input.dim() == 1 ? 0 : 1;
  p.C = input.size(class_dim);
  PVK_CHECK(p.C > 0, op, ": expected input to have at least one class, but got ", shape_of(input));
  PVK_CHECK(p.C <= INT32_MAX, op, ": expected input to have at most ", INT32_MAX, " classes, but got ", p.C);
  p.N = class_dim == 0 ? 1 : input.size(0);
  p.S = 1;
  for (int64_t i = 2; i < input.dim(); ++i) p.S *= input.size(i);
  p.classes_last = class_dim == 0 || has_classes_last(input);
  PVK_CHECK(input.is_contiguous() || p.classes_last, op,
            ": expected input to be contiguous, or its classes to be neighbours, but got size ", shape_of(input));
  p.is_soft = target.scalar_type() != ScalarType::Long;
  if (p.is_soft) {
    PVK_CHECK(target.scalar_type() == input.scalar_type(), op, ": expected target to be int64, or ",
              input.scalar_type(), " as input is, but got ", target.scalar_type());
    PVK_CHECK(shape_of(target) == shape_of(input), op, ": expected target to have size ", shape_of(input),
              " of input, but got ", shape_of(target));
    PVK_CHECK(p.classes_last ? input.dim() == 1 || has_classes_last(target) : target.is_contiguous(), op,
              ": expected target to lie in memory as input does, but got size ", shape_of(target));
  } else {
    bool fits = target.dim() == input.dim() - 1;
    for (int64_t i = 0; fits && i < target.dim(); ++i) fits = target.size(i) == input.size(i < class_dim ? i : i + 1);
    PVK_CHECK(fits, op, ": expected target to have the size of input, ", shape_of(input),
              ", without its classes, but got ", shape_of(target));
    PVK_CHECK(target.is_contiguous(), op, ": expected target to be contiguous, but got size ", shape_of(target));
  }
  check_same_device(op, "target", target, "input", input);
  if (weight) {
    PVK_CHECK(weight->dim() == 1 && weight->size(0) == p.C && weight->is_contiguous(), op,
              ": expected weight to have size [", p.C, "], but got ", shape_of(*weight));
    p.weight_dtype = dtype_of(op, "weight", *weight);
    PVK_CHECK(p.weight_dtype == p.dtype || (p.weight_dtype == DType::kFloat32 && p.dtype != DType::kFloat64), op,
              ": expected weight to be ", input.scalar_type(), " as input is, but got ", weight->scalar_type());
    check_same_device(op, "weight", *weight, "input", input);
    p.weight = data_of(*weight);
  }
  PVK_CHECK(reduction >= 0 && reduction <= 2, op, ": expected reduction to be 0, 1 or 2, but got ", reduction);
  PVK_CHECK(smoothing >= 0 && smoothing <= 1, op, ": expected label_smoothing to be in [0, 1], but got ", smoothing);
  p.reduction = Reduction(reduction);
  p.ignore_index = ignore_index;
  p.smoothing = smoothing;
  p.input = data_of(input);
  p.target = data_of(target);
  return p;
}

ScalarType opmath_of(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// [P] as the target of labels is; nothing but a number of a reduction.
Tensor make_loss(const SoftmaxCrossEntropyParams& p, const Tensor& input, ScalarType dtype) {
  if (p.reduction != Reduction::kNone || input.dim() == 1) return empty({}, dtype, input);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < input.dim(); ++i)
    if (i != 1) sizes.push_back(input.size(i));
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, input.device());
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& input, const Tensor& target, const Optional& weight,
                                      int64_t ignore_index, int64_t reduction, double smoothing, bool in_single) {
  constexpr const char* kOp = "softmax_cross_entropy";
  const DeviceScope scope(input);
  SoftmaxCrossEntropyParams p = make_params(kOp, input, target, weight, ignore_index, reduction, smoothing);
  PVK_CHECK(!in_single || p.dtype != DType::kFloat64, kOp, ": expected input of 16 or 32 bits, but got ",
            input.scalar_type());
  const Tensor loss = make_loss(p, input, in_single ? ScalarType::Float : input.scalar_type());
  const Tensor stats = empty({2 * p.N * p.S + 1}, opmath_of(input), input);
  const Tensor partials = empty({kParts, 2}, ScalarType::Double, input);
  p.loss = data_of(loss);
  p.loss_dtype = dtype_of(kOp, "loss", loss);
  p.stats = data_of(stats);
  p.partials = static_cast<double*>(data_of(partials));
  const int64_t wrong = forward(p, scope.stream());
  PVK_CHECK(wrong < 0, kOp, ": expected target to be in [0, ", p.C, ") or ignore_index, ", ignore_index, ", but got ",
            static_cast<const int64_t*>(p.target)[wrong]);
  return {loss, stats};
}

Tensor new_like(const Tensor& tensor) {
  const Tensor result = torch::stable::empty_like(tensor);
#if !defined(PVK_CUDA)
  advise_huge_pages(result.data_ptr(), result.numel() * int64_t(result.element_size()));
#endif
  return result;
}

std::tuple<Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& input, const Tensor& target,
                                       const Optional& weight, const Tensor& stats, int64_t ignore_index,
                                       int64_t reduction, double smoothing, bool needs_input, bool needs_target) {
  constexpr const char* kOp = "_softmax_cross_entropy_backward";
  const DeviceScope scope(input);
  SoftmaxCrossEntropyParams p = make_params(kOp, input, target, weight, ignore_index, reduction, smoothing);
  const int64_t positions = p.N * p.S, grads = p.reduction == Reduction::kNone ? positions : 1;
  PVK_CHECK(grad.numel() == grads && grad.is_contiguous(), kOp, ": expected grad to have ", grads,
            " contiguous elements, but got ", shape_of(grad));
  PVK_CHECK(grad.scalar_type() == input.scalar_type() ||
                (grad.scalar_type() == ScalarType::Float && p.dtype != DType::kFloat64),
            kOp, ": expected grad to be ", input.scalar_type(), " as input is, but got ", grad.scalar_type());
  PVK_CHECK(stats.scalar_type() == opmath_of(input) && stats.numel() == 2 * positions + 1 && stats.is_contiguous(), kOp,
            ": expected stats to have size [", 2 * positions + 1, "], but got ", shape_of(stats));
  PVK_CHECK(!needs_target || p.is_soft, kOp, ": expected target to be probabilities, but got labels");
  check_same_device(kOp, "grad", grad, "input", input);
  check_same_device(kOp, "stats", stats, "input", input);
  const Tensor grad_input = needs_input ? new_like(input) : empty({0}, input.scalar_type(), input);
  const Tensor grad_target = needs_target ? new_like(input) : empty({0}, input.scalar_type(), input);
  p.grad = data_of(grad);
  p.loss_dtype = dtype_of(kOp, "grad", grad);
  p.stats = data_of(stats);
  p.grad_input = needs_input ? data_of(grad_input) : nullptr;
  p.grad_target = needs_target ? data_of(grad_target) : nullptr;
  if (positions > 0 && (needs_input || needs_target)) backward(p, scope.stream());
  return {grad_input, grad_target};
}

}  // namespace
}  // namespace pvk::softmax_cross_entropy

PVK_LIBRARY_IMPL(m) {
  m.impl("softmax_cross_entropy", TORCH_BOX(&pvk::softmax_cross_entropy::forward_op));
  m.impl("_softmax_cross_entropy_backward", TORCH_BOX(&pvk::softmax_cross_entropy::backward_op));
}
