// Binding of roi_align: tensors -> checks -> RoiAlignParams -> the backend's kernel.
#include "ops/roi_align/roi_align.h"

#include "core/binding.h"

namespace pvk::roi_align {
namespace {

RoiAlignParams make_params(const char* op, const Tensor& map, const Tensor& pooled, const Tensor& boxes,
                           double spatial_scale, int64_t sampling_ratio, bool aligned, bool channels_last) {
  RoiAlignParams p{};
  p.map = data_of(map);
  p.pooled = data_of(pooled);
  p.boxes = data_of(boxes);
  p.dtype = dtype_of(op, "input", map);
  p.boxes_dtype = dtype_of(op, "boxes", boxes);
  p.N = map.size(0);
  p.C = map.size(1);
  p.H = map.size(2);
  p.W = map.size(3);
  p.K = pooled.size(0);
  p.PH = pooled.size(2);
  p.PW = pooled.size(3);
  for (int i = 0; i < 4; ++i) {
    p.map_stride[i] = map.stride(i);
    p.pooled_stride[i] = pooled.stride(i);
  }
  for (int i = 0; i < 2; ++i) p.boxes_stride[i] = boxes.stride(i);
  p.spatial_scale = spatial_scale;
  p.sampling_ratio = sampling_ratio;
  p.aligned = aligned;
  p.channels_last = channels_last;
  return p;
}

void check_boxes(const char* op, const Tensor& map, const Tensor& boxes, int64_t sampling_ratio) {
  PVK_CHECK(sampling_ratio <= kMaxSamplingRatio, op, ": expected sampling_ratio to be at most ", kMaxSamplingRatio,
            ", but got ", sampling_ratio);
  PVK_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, op, ": expected boxes to have size [K, 5], but got ",
            shape_of(boxes));
  check_same_device(op, "boxes", boxes, "input", map);
  PVK_CHECK(boxes.scalar_type() == map.scalar_type() ||
                (boxes.scalar_type() == ScalarType::Float && map.scalar_type() != ScalarType::Double),
            op, ": expected boxes to be ", map.scalar_type(),
            " as input is, or float32 beside a 16-bit input, but got ", boxes.scalar_type());
}

Tensor forward_op(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                  int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  constexpr const char* kOp = "roi_align";
  PVK_CHECK(input.dim() == 4, kOp, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  PVK_CHECK(pooled_height > 0 && pooled_width > 0, kOp, ": expected output_size to be positive, but got [",
            pooled_height, ", ", pooled_width, "]");
  check_boxes(kOp, input, boxes, sampling_ratio);
  const bool channels_last = input.stride(1) == 1 && !input.is_contiguous();
  const Tensor output =
      empty({boxes.size(0), input.size(1), pooled_height, pooled_width}, input.scalar_type(), input, channels_last);
  const DeviceScope scope(input);
  forward(make_params(kOp, input, output, boxes, spatial_scale, sampling_ratio, aligned, channels_last),
          scope.stream());
  return output;
}

Tensor backward_op(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t batch_size, int64_t channels,
                   int64_t height, int64_t width, int64_t sampling_ratio, bool aligned, bool channels_last) {
  constexpr const char* kOp = "_roi_align_backward";
  PVK_CHECK(grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == channels, kOp,
            ": expected grad to have size [", boxes.size(0), ", ", channels, ", PH, PW], but got ", shape_of(grad));
  PVK_CHECK(grad.size(2) > 0 && grad.size(3) > 0, kOp, ": expected grad to have bins, but got ", shape_of(grad));
  PVK_CHECK(batch_size >= 0 && channels >= 0 && height >= 0 && width >= 0, kOp,
            ": expected sizes that are not negative");
  check_boxes(kOp, grad, boxes, sampling_ratio);
  const Tensor grad_input = empty({batch_size, channels, height, width}, grad.scalar_type(), grad, channels_last);
  const DeviceScope scope(grad);
  backward(make_params(kOp, grad_input, grad, boxes, spatial_scale, sampling_ratio, aligned, channels_last),
           scope.stream());
  return grad_input;
}

}  // namespace
}  // namespace pvk::roi_align

PVK_LIBRARY_IMPL(m) {
  m.impl("roi_align", TORCH_BOX(&pvk::roi_align::forward_op));
  m.impl("_roi_align_backward", TORCH_BOX(&pvk::roi_align::backward_op));
}
