// Binding of the NMS family: tensors -> checks -> parameters -> the backend's kernels.
#include "ops/nms/nms.h"

#include <tuple>

#include "core/binding.h"

namespace pvk::nms {
namespace {

struct Sorted {
  Tensor values, indices;
};

// Along the last dimension, stable.
Sorted sort(const Tensor& tensor, bool descending) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t(-1)), torch::stable::detail::from(descending)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

int bytes_of_groups(const char* op, const Tensor& idxs) {
  switch (idxs.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
      return int(idxs.element_size());
    default:
      fail(op, ": expected idxs to be of an integer dtype, but got ", idxs.scalar_type());
  }
}

// Boxes [..., N, 4], scores [..., N] and idxs [..., N] of one dtype and device.
DType check(const char* op, bool batched, const Tensor& boxes, const Tensor& scores, const Tensor* idxs) {
  const int64_t rank = batched ? 3 : 2;
  PVK_CHECK(boxes.dim() == rank && boxes.size(rank - 1) == 4, op, ": expected boxes to have size ",
            batched ? "[B, N, 4]" : "[N, 4]", ", but got ", shape_of(boxes));
  const auto fits = [&](const Tensor& tensor) {
    bool equal = tensor.dim() == rank - 1;
    for (int64_t i = 0; equal && i < rank - 1; ++i) equal = tensor.size(i) == boxes.size(i);
    return equal;
  };
  const auto size = [&] {
    std::ostringstream text;
    text << '[';
    if (batched) text << boxes.size(0) << ", ";
    text << boxes.size(rank - 2) << ']';
    return text.str();
  };
  PVK_CHECK(fits(scores), op, ": expected scores to have size ", size(), ", but got ", shape_of(scores));
  check_same_device(op, "scores", scores, "boxes", boxes);
  if (idxs != nullptr) {
    PVK_CHECK(fits(*idxs), op, ": expected idxs to have size ", size(), ", but got ", shape_of(*idxs));
    check_same_device(op, "idxs", *idxs, "boxes", boxes);
  }
  const DType dtype = dtype_of(op, "boxes", boxes);
  PVK_CHECK(dtype_of(op, "scores", scores) == dtype, op, ": expected scores to be ", boxes.scalar_type(),
            " as boxes is, but got ", scores.scalar_type());
  return dtype;
}

// Inside a DeviceScope: all but keep, count and scratch. `sorted` holds what p.order points to.
NmsParams params_of(DType dtype, bool batched, const Tensor& boxes, const Tensor& scores, const Tensor* idxs,
                    int group_bytes, double iou_threshold, std::optional<Sorted>& sorted) {
  NmsParams p{};
  p.dtype = dtype;
  p.B = batched ? boxes.size(0) : 1;
  p.N = scores.size(batched);
  p.iou_threshold = iou_threshold;
  p.group_bytes = group_bytes;
  const auto strides = [&](const Tensor& tensor, int64_t (&into)[2]) {
    into[0] = batched ? tensor.stride(0) : 0;
    into[1] = tensor.stride(batched);
  };
  p.boxes = data_of(boxes);
  p.boxes_stride[0] = batched ? boxes.stride(0) : 0;
  for (int i = 0; i < 2; ++i) p.boxes_stride[1 + i] = boxes.stride(batched + i);
  p.scores = data_of(scores);
  strides(scores, p.scores_stride);
  if (idxs != nullptr) {
    p.groups = data_of(*idxs);
    strides(*idxs, p.groups_stride);
  }
  if (!sorts_scores()) {
    sorted = sort(scores, true);
    p.order = static_cast<const int64_t*>(data_of(sorted->indices));
    strides(sorted->indices, p.order_stride);
  }
  return p;
}

Tensor forward_one(const char* op, const Tensor& boxes, const Tensor& scores, const Tensor* idxs,
                   double iou_threshold) {
  const DType dtype = check(op, false, boxes, scores, idxs);
  const int group_bytes = idxs != nullptr ? bytes_of_groups(op, *idxs) : 0;
  const int64_t N = boxes.size(0);
  const Tensor keep = empty({N}, ScalarType::Long, boxes);
  if (N == 0) return keep;
  const DeviceScope scope(boxes);
  std::optional<Sorted> sorted;
  NmsParams p = params_of(dtype, false, boxes, scores, idxs, group_bytes, iou_threshold, sorted);
  const Tensor scratch = empty({int64_t(sizeof(int64_t)) + scratch_bytes(1, N)}, ScalarType::Byte, boxes);
  p.max_output = N;
  p.keep = static_cast<int64_t*>(data_of(keep));
  p.count = static_cast<int64_t*>(data_of(scratch));
  p.scratch = p.count + 1;
  forward(p, scope.stream());
  Tensor all = keep;
  return torch::stable::narrow(all, 0, 0, read_count(p.count, scope.stream()));
}

Tensor nms_op(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return forward_one("nms", boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms_op(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
  return forward_one("batched_nms", boxes, scores, &idxs, iou_threshold);
}

std::tuple<Tensor, Tensor> batched_nms_padded_op(const Tensor& boxes, const Tensor& scores,
                                                 const std::optional<Tensor>& idxs, double iou_threshold,
                                                 int64_t max_output) {
  constexpr const char* kOp = "batched_nms_padded";
  const Tensor* const groups = idxs ? &*idxs : nullptr;
  const DType dtype = check(kOp, true, boxes, scores, groups);
  const int group_bytes = groups != nullptr ? bytes_of_groups(kOp, *groups) : 0;
  PVK_CHECK(max_output >= 0, kOp, ": expected max_output to be at least 0, but got ", max_output);
  const int64_t B = boxes.size(0), N = boxes.size(1);
  Tensor keep = empty({B, max_output}, ScalarType::Long, boxes);
  Tensor count = empty({B}, ScalarType::Long, boxes);
  if (B == 0 || N == 0 || max_output == 0) {
    torch::stable::fill_(keep, -1);
    torch::stable::zero_(count);
    return {keep, count};
  }
  const DeviceScope scope(boxes);
  std::optional<Sorted> sorted;
  NmsParams p = params_of(dtype, true, boxes, scores, groups, group_bytes, iou_threshold, sorted);
  const Tensor scratch = empty({scratch_bytes(B, N)}, ScalarType::Byte, boxes);
  p.max_output = max_output;
  p.padded = true;
  p.keep = static_cast<int64_t*>(data_of(keep));
  p.count = static_cast<int64_t*>(data_of(count));
  p.scratch = data_of(scratch);
  forward(p, scope.stream());
  return {keep, count};
}

std::tuple<Tensor, Tensor> soft_nms_op(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                                       double iou_threshold, double sigma, double score_threshold, bool gaussian) {
  constexpr const char* kOp = "soft_nms";
  const Tensor* const groups = idxs ? &*idxs : nullptr;
  SoftNmsParams p{};
  p.dtype = check(kOp, false, boxes, scores, groups);
  p.group_bytes = groups != nullptr ? bytes_of_groups(kOp, *groups) : 0;
  p.N = boxes.size(0);
  const Tensor kept_scores = empty({p.N}, boxes.scalar_type(), boxes);
  if (p.N == 0) return {empty({0}, ScalarType::Long, boxes), kept_scores};
  const DeviceScope scope(boxes);
  p.boxes = data_of(boxes);
  p.scores = data_of(scores);
  for (int i = 0; i < 2; ++i) p.boxes_stride[i] = boxes.stride(i);
  p.scores_stride = scores.stride(0);
  std::optional<Sorted> by_group;
  if (groups != nullptr) {
    p.groups = data_of(*groups);
    p.groups_stride = groups->stride(0);
    if (!sorts_scores()) {
      by_group = sort(*groups, false);
      p.order = static_cast<const int64_t*>(data_of(by_group->indices));
    }
  }
  p.iou_threshold = iou_threshold;
  p.sigma = sigma;
  p.score_threshold = score_threshold;
  p.gaussian = gaussian;
  const auto wide = p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const Tensor decayed = empty({p.N}, wide, boxes);
  // The count lies first; what follows is aligned as vectors need it.
  const Tensor scratch = empty({16 + soft_scratch_bytes(p.N, p.dtype)}, ScalarType::Byte, boxes);
  p.decayed = data_of(decayed);
  p.count = static_cast<int64_t*>(data_of(scratch));
  p.scratch = p.count + 2;
  p.kept_scores = data_of(kept_scores);
  soft_decay(p, scope.stream());
  std::optional<Sorted> by_score;
  if (!sorts_scores()) {
    by_score = sort(decayed, true);
    p.sorted = data_of(by_score->values);
  }
  Tensor keep = by_score ? by_score->indices : empty({p.N}, ScalarType::Long, boxes);
  p.keep = static_cast<int64_t*>(data_of(keep));
  soft_finish(p, scope.stream());
  const int64_t count = read_count(p.count, scope.stream());
  Tensor all = kept_scores;
  return {torch::stable::narrow(keep, 0, 0, count), torch::stable::narrow(all, 0, 0, count)};
}

}  // namespace
}  // namespace pvk::nms

PVK_LIBRARY_IMPL(m) {
  m.impl("nms", TORCH_BOX(&pvk::nms::nms_op));
  m.impl("batched_nms", TORCH_BOX(&pvk::nms::batched_nms_op));
  m.impl("batched_nms_padded", TORCH_BOX(&pvk::nms::batched_nms_padded_op));
  m.impl("soft_nms", TORCH_BOX(&pvk::nms::soft_nms_op));
}
