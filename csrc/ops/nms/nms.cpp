// Binding of nms: tensors -> checks -> NmsParams -> the backend's kernel.
#include "ops/nms/nms.h"

#include "core/binding.h"

namespace pvk::nms {
namespace {

Tensor sorted_order(const Tensor& scores) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(scores),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the sorted scores: taken off the stack and released
  return torch::stable::detail::to<Tensor>(stack[1]);
}

Tensor forward_op(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  constexpr const char* kOp = "nms";
  PVK_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, kOp, ": expected boxes to have size [N, 4], but got ",
            shape_of(boxes));
  PVK_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), kOp, ": expected scores to have size [",
            boxes.size(0), "], but got ", shape_of(scores));
  check_same_device(kOp, "scores", scores, "boxes", boxes);
  NmsParams p{};
  p.dtype = dtype_of(kOp, "boxes", boxes);
  PVK_CHECK(dtype_of(kOp, "scores", scores) == p.dtype, kOp, ": expected scores to be ", boxes.scalar_type(),
            " as boxes is, but got ", scores.scalar_type());
  p.N = boxes.size(0);
  Tensor keep = empty({p.N}, ScalarType::Long, boxes);
  if (p.N == 0) return keep;
  const DeviceScope scope(boxes);
  const Tensor order = sorted_order(scores);
  const Tensor scratch = empty({scratch_bytes(p.N, p.dtype)}, ScalarType::Byte, boxes);
  p.boxes = data_of(boxes);
  p.order = static_cast<const int64_t*>(data_of(order));
  p.keep = static_cast<int64_t*>(data_of(keep));
  p.scratch = data_of(scratch);
  for (int i = 0; i < 2; ++i) p.boxes_stride[i] = boxes.stride(i);
  p.iou_threshold = iou_threshold;
  return torch::stable::narrow(keep, 0, 0, forward(p, scope.stream()));
}

}  // namespace
}  // namespace pvk::nms

PVK_LIBRARY_IMPL(m) {
  m.impl("nms", TORCH_BOX(&pvk::nms::forward_op));
}
