// Binding of box_iou: tensors -> checks -> BoxIouParams -> the backend's kernel.
#include "ops/box_iou/box_iou.h"

#include <tuple>

#include "core/binding.h"

namespace pvk::box_iou {
namespace {

// [N, 4], or [B, N, 4].
BoxIouParams make_params(const char* op, const Tensor& boxes1, const Tensor& boxes2, int64_t kind, int64_t format,
                         double eps) {
  const int64_t rank = boxes1.dim();
  PVK_CHECK((rank == 2 || rank == 3) && boxes1.size(rank - 1) == 4, op,
            ": expected boxes1 to have size [N, 4] or [B, N, 4], but got ", shape_of(boxes1));
  PVK_CHECK(boxes2.dim() == rank && boxes2.size(rank - 1) == 4 && (rank == 2 || boxes2.size(0) == boxes1.size(0)), op,
            ": expected boxes2 to have size [M, 4] or [B, M, 4] as boxes1 has, but got ", shape_of(boxes2));
  check_same_device(op, "boxes2", boxes2, "boxes1", boxes1);
  PVK_CHECK(boxes2.scalar_type() == boxes1.scalar_type(), op, ": expected boxes2 to be ", boxes1.scalar_type(),
            " as boxes1 is, but got ", boxes2.scalar_type());
  PVK_CHECK(kind >= 0 && kind <= int64_t(Kind::kComplete), op, ": expected kind to be 0, 1, 2 or 3, but got ", kind);
  PVK_CHECK(format >= 0 && format <= int64_t(Format::kCxcywh), op, ": expected format to be 0, 1 or 2, but got ",
            format);
  BoxIouParams p{};
  p.boxes1 = data_of(boxes1);
  p.boxes2 = data_of(boxes2);
  p.dtype = dtype_of(op, "boxes1", boxes1);
  p.kind = Kind(kind);
  p.format = Format(format);
  p.B = rank == 3 ? boxes1.size(0) : 1;
  p.N = boxes1.size(rank - 2);
  p.M = boxes2.size(rank - 2);
  for (int64_t i = 0; i < rank; ++i) {
    p.boxes1_stride[3 - rank + i] = boxes1.stride(i);
    p.boxes2_stride[3 - rank + i] = boxes2.stride(i);
  }
  p.eps = eps;
  return p;
}

ScalarType output_dtype(const Tensor& boxes) {
  return boxes.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor forward_op(const Tensor& boxes1, const Tensor& boxes2, int64_t kind, int64_t format, double eps) {
  const DeviceScope scope(boxes1);
  BoxIouParams p = make_params("box_iou", boxes1, boxes2, kind, format, eps);
  const Tensor output = boxes1.dim() == 2 ? empty({p.N, p.M}, output_dtype(boxes1), boxes1)
                                          : empty({p.B, p.N, p.M}, output_dtype(boxes1), boxes1);
  p.output = data_of(output);
  forward(p, scope.stream());
  return output;
}

// What is not needed comes back empty.
std::tuple<Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2, int64_t kind,
                                       int64_t format, double eps, bool need1, bool need2) {
  constexpr const char* kOp = "_box_iou_backward";
  const DeviceScope scope(boxes1);
  BoxIouParams p = make_params(kOp, boxes1, boxes2, kind, format, eps);
  const int64_t rank = boxes1.dim();
  PVK_CHECK(grad.dim() == rank && (rank == 2 || grad.size(0) == p.B) && grad.size(rank - 2) == p.N &&
                grad.size(rank - 1) == p.M,
            kOp, ": expected grad to have the size of the output, but got ", shape_of(grad));
  PVK_CHECK(grad.scalar_type() == output_dtype(boxes1), kOp, ": expected grad to be ", output_dtype(boxes1),
            " as the output is, but got ", grad.scalar_type());
  check_same_device(kOp, "grad", grad, "boxes1", boxes1);
  const auto make = [&](const Tensor& boxes, bool need) {
    if (!need) return empty({0}, boxes.scalar_type(), boxes);
    if (rank == 2) return empty({boxes.size(0), 4}, boxes.scalar_type(), boxes);
    return empty({boxes.size(0), boxes.size(1), 4}, boxes.scalar_type(), boxes);
  };
  const Tensor grad1 = make(boxes1, need1), grad2 = make(boxes2, need2);
  p.grad = data_of(grad);
  for (int64_t i = 0; i < rank; ++i) p.grad_stride[3 - rank + i] = grad.stride(i);
  p.grad1 = need1 && p.B * p.N > 0 ? data_of(grad1) : nullptr;
  p.grad2 = need2 && p.B * p.M > 0 ? data_of(grad2) : nullptr;
  if (p.grad1 == nullptr && p.grad2 == nullptr) return {grad1, grad2};
  const Tensor scratch = empty({scratch_bytes(p)}, ScalarType::Byte, boxes1);
  p.scratch = data_of(scratch);
  backward(p, scope.stream());
  return {grad1, grad2};
}

}  // namespace
}  // namespace pvk::box_iou

PVK_LIBRARY_IMPL(m) {
  m.impl("box_iou", TORCH_BOX(&pvk::box_iou::forward_op));
  m.impl("_box_iou_backward", TORCH_BOX(&pvk::box_iou::backward_op));
}
