// Binding of sigmoid_focal_loss: tensors -> checks -> SigmoidFocalLossParams -> the backend's kernel.
#include "ops/sigmoid_focal_loss/sigmoid_focal_loss.h"

#include <tuple>

#include "core/binding.h"

namespace pvk::sigmoid_focal_loss {
namespace {

SigmoidFocalLossParams make_params(const char* op, const Tensor& inputs, const Tensor& targets, double alpha,
                                   double gamma, int64_t reduction) {
  PVK_CHECK(inputs.is_contiguous(), op, ": expected inputs to be contiguous, but got size ", shape_of(inputs));
  PVK_CHECK(targets.is_contiguous(), op, ": expected targets to be contiguous, but got size ", shape_of(targets));
  PVK_CHECK(shape_of(targets) == shape_of(inputs), op, ": expected targets to have size ", shape_of(inputs),
            ", but got ", shape_of(targets));
  PVK_CHECK(targets.scalar_type() == inputs.scalar_type(), op, ": expected targets to be ", inputs.scalar_type(),
            " as inputs is, but got ", targets.scalar_type());
  PVK_CHECK(reduction >= 0 && reduction <= 2, op, ": expected reduction to be 0, 1 or 2, but got ", reduction);
  check_same_device(op, "targets", targets, "inputs", inputs);
  SigmoidFocalLossParams p{};
  p.inputs = data_of(inputs);
  p.targets = data_of(targets);
  p.dtype = dtype_of(op, "inputs", inputs);
  p.reduction = Reduction(reduction);
  p.count = inputs.numel();
  p.alpha = alpha;
  p.gamma = gamma;
  return p;
}

Tensor new_like(const Tensor& tensor) {
  const Tensor result = torch::stable::empty_like(tensor);
#if !defined(PVK_CUDA)
  advise_huge_pages(result.data_ptr(), result.numel() * int64_t(result.element_size()));
#endif
  return result;
}

Tensor forward_op(const Tensor& inputs, const Tensor& targets, double alpha, double gamma, int64_t reduction) {
  const DeviceScope scope(inputs);
  SigmoidFocalLossParams p = make_params("sigmoid_focal_loss", inputs, targets, alpha, gamma, reduction);
  const bool reduces = p.reduction != Reduction::kNone;
  const Tensor loss = reduces ? empty({}, inputs.scalar_type(), inputs) : new_like(inputs);
  const Tensor partials = empty({reduces ? kPartials : 0}, ScalarType::Double, inputs);
  p.loss = data_of(loss);
  p.partials = static_cast<double*>(data_of(partials));
  forward(p, scope.stream());
  return loss;
}

// One value for all, as the gradient of a sum is.
bool is_single(const Tensor& grad) {
  if (grad.numel() == 0) return false;
  for (int64_t i = 0; i < grad.dim(); ++i)
    if (grad.size(i) != 1 && grad.stride(i) != 0) return false;
  return true;
}

std::tuple<Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& inputs, const Tensor& targets, double alpha,
                                       double gamma, int64_t reduction, bool needs_inputs, bool needs_targets) {
  constexpr const char* kOp = "_sigmoid_focal_loss_backward";
  const DeviceScope scope(inputs);
  SigmoidFocalLossParams p = make_params(kOp, inputs, targets, alpha, gamma, reduction);
  const std::string size = p.reduction == Reduction::kNone ? shape_of(inputs) : "[]";
  PVK_CHECK(shape_of(grad) == size, kOp, ": expected grad to have size ", size, ", but got ", shape_of(grad));
  PVK_CHECK(grad.scalar_type() == inputs.scalar_type(), kOp, ": expected grad to be ", inputs.scalar_type(),
            " as inputs is, but got ", grad.scalar_type());
  check_same_device(kOp, "grad", grad, "inputs", inputs);
  p.grad_is_single = is_single(grad);
  PVK_CHECK(p.grad_is_single || grad.is_contiguous(), kOp,
            ": expected grad to be contiguous or one value, but got size ", shape_of(grad));
  const Tensor absent = empty({0}, inputs.scalar_type(), inputs);
  const Tensor grad_inputs = needs_inputs ? new_like(inputs) : absent;
  const Tensor grad_targets = needs_targets ? new_like(inputs) : empty({0}, inputs.scalar_type(), inputs);
  p.grad = data_of(grad);
  p.grad_inputs = needs_inputs ? data_of(grad_inputs) : nullptr;
  p.grad_targets = needs_targets ? data_of(grad_targets) : nullptr;
  backward(p, scope.stream());
  return {grad_inputs, grad_targets};
}

}  // namespace
}  // namespace pvk::sigmoid_focal_loss

PVK_LIBRARY_IMPL(m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&pvk::sigmoid_focal_loss::forward_op));
  m.impl("_sigmoid_focal_loss_backward", TORCH_BOX(&pvk::sigmoid_focal_loss::backward_op));
}
