// Binding of roi_pool: tensors -> checks -> RoiPoolParams -> the backend's kernel.
#include "ops/roi_pool/roi_pool.h"

#include <tuple>

#include "core/binding.h"

namespace pvk::roi_pool {
namespace {

RoiPoolParams make_params(const char* op, const Tensor& map, const Tensor& pooled, const Tensor& argmax,
                          const Tensor& boxes, double spatial_scale, bool channels_last) {
  RoiPoolParams p{};
  p.map = data_of(map);
  p.pooled = data_of(pooled);
  p.argmax = static_cast<int32_t*>(data_of(argmax));
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
    p.argmax_stride[i] = argmax.stride(i);
  }
  for (int i = 0; i < 2; ++i) p.boxes_stride[i] = boxes.stride(i);
  p.spatial_scale = spatial_scale;
  p.channels_last = channels_last;
  return p;
}

void check_boxes(const char* op, const Tensor& map, const Tensor& boxes) {
  PVK_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, op, ": expected boxes to have size [K, 5], but got ",
            shape_of(boxes));
  check_same_device(op, "boxes", boxes, "input", map);
  PVK_CHECK(boxes.scalar_type() == map.scalar_type() ||
                (boxes.scalar_type() == ScalarType::Float && map.scalar_type() != ScalarType::Double),
            op, ": expected boxes to be ", map.scalar_type(),
            " as input is, or float32 beside a 16-bit input, but got ", boxes.scalar_type());
}

void check_pixels(const char* op, int64_t height, int64_t width) {
  constexpr int64_t kPixels = int64_t(1) << 31;
  PVK_CHECK(width == 0 || height <= (kPixels - 1) / width, op, ": expected input to have fewer than ", kPixels,
            " pixels a channel, but got ", height, " x ", width);
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& input, const Tensor& boxes, double spatial_scale,
                                      int64_t pooled_height, int64_t pooled_width) {
  constexpr const char* kOp = "roi_pool";
  PVK_CHECK(input.dim() == 4, kOp, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  PVK_CHECK(pooled_height > 0 && pooled_width > 0, kOp, ": expected output_size to be positive, but got [",
            pooled_height, ", ", pooled_width, "]");
  check_boxes(kOp, input, boxes);
  check_pixels(kOp, input.size(2), input.size(3));
  const bool channels_last = input.stride(1) == 1 && !input.is_contiguous();
  const std::initializer_list<int64_t> size{boxes.size(0), input.size(1), pooled_height, pooled_width};
  const Tensor output = empty(size, input.scalar_type(), input, channels_last);
  const Tensor argmax = empty(size, ScalarType::Int, input, channels_last);
  const DeviceScope scope(input);
  forward(make_params(kOp, input, output, argmax, boxes, spatial_scale, channels_last), scope.stream());
  return {output, argmax};
}

Tensor backward_op(const Tensor& grad, const Tensor& boxes, const Tensor& argmax, double spatial_scale,
                   int64_t pooled_height, int64_t pooled_width, int64_t batch_size, int64_t channels, int64_t height,
                   int64_t width, bool channels_last) {
  constexpr const char* kOp = "_roi_pool_backward";
  PVK_CHECK(pooled_height > 0 && pooled_width > 0, kOp, ": expected output_size to be positive, but got [",
            pooled_height, ", ", pooled_width, "]");
  PVK_CHECK(batch_size >= 0 && channels >= 0 && height >= 0 && width >= 0, kOp,
            ": expected sizes that are not negative");
  check_boxes(kOp, grad, boxes);
  check_pixels(kOp, height, width);
  for (const Tensor* tensor : {&grad, &argmax}) {
    PVK_CHECK(tensor->dim() == 4 && tensor->size(0) == boxes.size(0) && tensor->size(1) == channels &&
                  tensor->size(2) == pooled_height && tensor->size(3) == pooled_width,
              kOp, ": expected ", tensor == &grad ? "grad" : "argmax", " to have size [", boxes.size(0), ", ", channels,
              ", ", pooled_height, ", ", pooled_width, "], but got ", shape_of(*tensor));
  }
  PVK_CHECK(argmax.scalar_type() == ScalarType::Int, kOp, ": expected argmax to be int32, but got ",
            argmax.scalar_type());
  check_same_device(kOp, "argmax", argmax, "grad", grad);
  const Tensor grad_input = empty({batch_size, channels, height, width}, grad.scalar_type(), grad, channels_last);
  const DeviceScope scope(grad);
  backward(make_params(kOp, grad_input, grad, argmax, boxes, spatial_scale, channels_last), scope.stream());
  return grad_input;
}

}  // namespace
}  // namespace pvk::roi_pool

PVK_LIBRARY_IMPL(m) {
  m.impl("roi_pool", TORCH_BOX(&pvk::roi_pool::forward_op));
  m.impl("_roi_pool_backward", TORCH_BOX(&pvk::roi_pool::backward_op));
}
