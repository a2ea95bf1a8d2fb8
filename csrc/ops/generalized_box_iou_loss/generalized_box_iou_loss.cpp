// Binding of generalized_box_iou_loss: tensors -> checks -> LossParams -> the backend's kernel.
#include "ops/generalized_box_iou_loss/generalized_box_iou_loss.h"

#include <tuple>

#include "core/binding.h"

namespace pvk::generalized_box_iou_loss {
namespace {

using box_iou::Kind;

// torchvision's complete loss hands its epsilon to alpha alone.
constexpr double kCompleteEps = 1e-7;

LossParams make_params(const char* op, const Tensor& boxes1, const Tensor& boxes2, int64_t kind, int64_t reduction,
                       double eps) {
  PVK_CHECK(boxes1.dim() == 2 && boxes1.size(1) == 4, op, ": expected boxes1 to have size [N, 4], but got ",
            shape_of(boxes1));
  PVK_CHECK(boxes2.dim() == 2 && boxes2.size(0) == boxes1.size(0) && boxes2.size(1) == 4, op,
            ": expected boxes2 to have size ", shape_of(boxes1), " as boxes1 has, but got ", shape_of(boxes2));
  check_same_device(op, "boxes2", boxes2, "boxes1", boxes1);
  PVK_CHECK(boxes2.scalar_type() == boxes1.scalar_type(), op, ": expected boxes2 to be ", boxes1.scalar_type(),
            " as boxes1 is, but got ", boxes2.scalar_type());
  PVK_CHECK(kind > 0 && kind <= int64_t(Kind::kComplete), op, ": expected kind to be 1, 2 or 3, but got ", kind);
  PVK_CHECK(reduction >= 0 && reduction <= int64_t(Reduction::kSum), op,
            ": expected reduction to be 0, 1 or 2, but got ", reduction);
  LossParams p{};
  p.boxes1 = data_of(boxes1);
  p.boxes2 = data_of(boxes2);
  p.dtype = dtype_of(op, "boxes1", boxes1);
  p.kind = Kind(kind);
  p.reduction = Reduction(reduction);
  p.N = boxes1.size(0);
  for (int i = 0; i < 2; ++i) {
    p.boxes1_stride[i] = boxes1.stride(i);
    p.boxes2_stride[i] = boxes2.stride(i);
  }
  p.union_eps = p.enclosing_eps = p.kind == Kind::kComplete ? kCompleteEps : eps;
  p.alpha_eps = eps;
  return p;
}

ScalarType loss_dtype(const Tensor& boxes) {
  return boxes.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor forward_op(const Tensor& boxes1, const Tensor& boxes2, int64_t kind, int64_t reduction, double eps) {
  const DeviceScope scope(boxes1);
  LossParams p = make_params("box_iou_loss", boxes1, boxes2, kind, reduction, eps);
  const Tensor loss = p.reduction == Reduction::kNone ? empty({p.N}, loss_dtype(boxes1), boxes1)
                                                      : empty({}, loss_dtype(boxes1), boxes1);
  const Tensor scratch = empty({scratch_bytes(p)}, ScalarType::Byte, boxes1);
  p.loss = data_of(loss);
  p.scratch = data_of(scratch);
  forward(p, scope.stream());
  return loss;
}

// What is not needed comes back empty.
std::tuple<Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2, int64_t kind,
                                       int64_t reduction, double eps, bool need1, bool need2) {
  constexpr const char* kOp = "_box_iou_loss_backward";
  const DeviceScope scope(boxes1);
  LossParams p = make_params(kOp, boxes1, boxes2, kind, reduction, eps);
  const bool reduced = p.reduction != Reduction::kNone;
  PVK_CHECK(reduced ? grad.dim() == 0 : grad.dim() == 1 && grad.size(0) == p.N, kOp,
            ": expected grad to have the size of the loss, but got ", shape_of(grad));
  PVK_CHECK(grad.scalar_type() == loss_dtype(boxes1), kOp, ": expected grad to be ", loss_dtype(boxes1),
            " as the loss is, but got ", grad.scalar_type());
  check_same_device(kOp, "grad", grad, "boxes1", boxes1);
  const Tensor grad1 = need1 ? empty({p.N, 4}, boxes1.scalar_type(), boxes1) : empty({0}, boxes1.scalar_type(), boxes1);
  const Tensor grad2 = need2 ? empty({p.N, 4}, boxes2.scalar_type(), boxes2) : empty({0}, boxes2.scalar_type(), boxes2);
  p.grad = data_of(grad);
  p.grad_stride = reduced ? 0 : grad.stride(0);
  p.grad1 = need1 ? data_of(grad1) : nullptr;
  p.grad2 = need2 ? data_of(grad2) : nullptr;
  if (p.N > 0) backward(p, scope.stream());
  return {grad1, grad2};
}

}  // namespace
}  // namespace pvk::generalized_box_iou_loss

PVK_LIBRARY_IMPL(m) {
  m.impl("box_iou_loss", TORCH_BOX(&pvk::generalized_box_iou_loss::forward_op));
  m.impl("_box_iou_loss_backward", TORCH_BOX(&pvk::generalized_box_iou_loss::backward_op));
}
