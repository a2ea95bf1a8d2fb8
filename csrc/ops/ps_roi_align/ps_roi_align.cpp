// Binding of ps_roi_align and ps_roi_pool: tensors -> checks -> PsRoiParams -> the backend's kernel.
#include "ops/ps_roi_align/ps_roi_align.h"

#include "core/binding.h"

namespace pvk::ps_roi_align {
namespace {

struct Sampling {
  double spatial_scale;
  int64_t ratio;
  bool pool;
};

PsRoiParams make_params(const char* op, const Tensor& map, const Tensor& pooled, const Tensor& boxes,
                        const Sampling& sampling) {
  PsRoiParams p{};
  p.map = data_of(map);
  p.pooled = data_of(pooled);
  p.boxes = data_of(boxes);
  p.dtype = dtype_of(op, "input", map);
  p.boxes_dtype = dtype_of(op, "boxes", boxes);
  p.N = map.size(0);
  p.C = pooled.size(1);
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
  p.spatial_scale = sampling.spatial_scale;
  p.sampling_ratio = sampling.ratio;
  p.pool = sampling.pool;
  return p;
}

void check_boxes(const char* op, const Tensor& map, const Tensor& boxes, const Sampling& sampling) {
  PVK_CHECK(sampling.ratio <= roi_align::kMaxSamplingRatio, op, ": expected sampling_ratio to be at most ",
            roi_align::kMaxSamplingRatio, ", but got ", sampling.ratio);
  PVK_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, op, ": expected boxes to have size [K, 5], but got ",
            shape_of(boxes));
  check_same_device(op, "boxes", boxes, "input", map);
  PVK_CHECK(boxes.scalar_type() == map.scalar_type() ||
                (boxes.scalar_type() == ScalarType::Float && map.scalar_type() != ScalarType::Double),
            op, ": expected boxes to be ", map.scalar_type(),
            " as input is, or float32 beside a 16-bit input, but got ", boxes.scalar_type());
}

// Channels of the output. The product of the bins is not formed before it is known to be small.
int64_t check_channels(const char* op, int64_t channels, int64_t pooled_height, int64_t pooled_width) {
  PVK_CHECK(pooled_height > 0 && pooled_width > 0, op, ": expected output_size to be positive, but got [",
            pooled_height, ", ", pooled_width, "]");
  PVK_CHECK(channels % pooled_height == 0 && channels / pooled_height % pooled_width == 0, op,
            ": expected input to have channels in a multiple of ", pooled_height, " * ", pooled_width, ", but got ",
            channels);
  return channels / pooled_height / pooled_width;
}

Tensor pool_map(const char* op, const Tensor& input, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
                const Sampling& sampling) {
  PVK_CHECK(input.dim() == 4, op, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  const int64_t channels = check_channels(op, input.size(1), pooled_height, pooled_width);
  check_boxes(op, input, boxes, sampling);
  const bool channels_last = input.stride(1) == 1 && !input.is_contiguous();
  const Tensor output =
      empty({boxes.size(0), channels, pooled_height, pooled_width}, input.scalar_type(), input, channels_last);
  const DeviceScope scope(input);
  forward(make_params(op, input, output, boxes, sampling), scope.stream());
  return output;
}

Tensor pool_gradient(const char* op, const Tensor& grad, const Tensor& boxes, int64_t pooled_height,
                     int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height, int64_t width,
                     bool channels_last, const Sampling& sampling) {
  PVK_CHECK(batch_size >= 0 && channels >= 0 && height >= 0 && width >= 0, op,
            ": expected sizes that are not negative");
  const int64_t pooled_channels = check_channels(op, channels, pooled_height, pooled_width);
  check_boxes(op, grad, boxes, sampling);
  PVK_CHECK(grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == pooled_channels &&
                grad.size(2) == pooled_height && grad.size(3) == pooled_width,
            op, ": expected grad to have size [", boxes.size(0), ", ", pooled_channels, ", ", pooled_height, ", ",
            pooled_width, "], but got ", shape_of(grad));
  const Tensor grad_input = empty({batch_size, channels, height, width}, grad.scalar_type(), grad, channels_last);
  const DeviceScope scope(grad);
  backward(make_params(op, grad_input, grad, boxes, sampling), scope.stream());
  return grad_input;
}

Tensor align_op(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                int64_t pooled_width, int64_t sampling_ratio) {
  return pool_map("ps_roi_align", input, boxes, pooled_height, pooled_width, {spatial_scale, sampling_ratio, false});
}

Tensor align_backward_op(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                         int64_t pooled_width, int64_t sampling_ratio, int64_t batch_size, int64_t channels,
                         int64_t height, int64_t width, bool channels_last) {
  return pool_gradient("_ps_roi_align_backward", grad, boxes, pooled_height, pooled_width, batch_size, channels, height,
                       width, channels_last, {spatial_scale, sampling_ratio, false});
}

Tensor pool_op(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
               int64_t pooled_width) {
  return pool_map("ps_roi_pool", input, boxes, pooled_height, pooled_width, {spatial_scale, 1, true});
}

Tensor pool_backward_op(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                        int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height, int64_t width,
                        bool channels_last) {
  return pool_gradient("_ps_roi_pool_backward", grad, boxes, pooled_height, pooled_width, batch_size, channels, height,
                       width, channels_last, {spatial_scale, 1, true});
}

}  // namespace
}  // namespace pvk::ps_roi_align

PVK_LIBRARY_IMPL(m) {
  m.impl("ps_roi_align", TORCH_BOX(&pvk::ps_roi_align::align_op));
  m.impl("_ps_roi_align_backward", TORCH_BOX(&pvk::ps_roi_align::align_backward_op));
  m.impl("ps_roi_pool", TORCH_BOX(&pvk::ps_roi_align::pool_op));
  m.impl("_ps_roi_pool_backward", TORCH_BOX(&pvk::ps_roi_align::pool_backward_op));
}
