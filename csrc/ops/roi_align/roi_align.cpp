// Binding of roi_align and multiscale_roi_align: tensors -> checks -> RoiAlignParams -> the backend's kernel.
#include "ops/roi_align/roi_align.h"

#include <vector>

#include "core/binding.h"

namespace pvk::roi_align {
namespace {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

// What is pooled, besides maps and RoIs.
struct Pooling {
  Numbers scales, areas;
  int64_t sampling_ratio;
  bool aligned, channels_last;
};

Real to_real(double value) {
  return {value, float(value)};
}

RoiAlignParams make_params(const char* op, const Tensors& maps, const Tensor& pooled, const Tensor& boxes,
                           const Pooling& pooling) {
  RoiAlignParams p{};
  p.num_levels = int(maps.size());
  for (int l = 0; l < p.num_levels; ++l) {
    const Tensor& map = maps[l];
    Level& level = p.levels[l];
    level.map = data_of(map);
    level.H = map.size(2);
    level.W = map.size(3);
    for (int i = 0; i < 4; ++i) level.stride[i] = map.stride(i);
    level.scale = to_real(pooling.scales[l]);
  }
  p.num_areas = int(pooling.areas.size());
  for (int i = 0; i < p.num_areas; ++i) p.areas[i] = to_real(pooling.areas[i]);
  p.pooled = data_of(pooled);
  p.boxes = data_of(boxes);
  p.dtype = dtype_of(op, "input", pooled);
  p.boxes_dtype = dtype_of(op, "boxes", boxes);
  p.N = maps[0].size(0);
  p.C = maps[0].size(1);
  p.K = pooled.size(0);
  p.PH = pooled.size(2);
  p.PW = pooled.size(3);
  for (int i = 0; i < 4; ++i) p.pooled_stride[i] = pooled.stride(i);
  for (int i = 0; i < 2; ++i) p.boxes_stride[i] = boxes.stride(i);
  p.sampling_ratio = pooling.sampling_ratio;
  p.aligned = pooling.aligned;
  p.channels_last = pooling.channels_last;
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

void check_levels(const char* op, size_t maps, const Pooling& pooling) {
  PVK_CHECK(maps > 0 && maps <= kMaxLevels, op, ": expected between 1 and ", kMaxLevels, " features, but got ", maps);
  PVK_CHECK(pooling.scales.size() == maps, op, ": expected one of scales for each of ", maps, " features, but got ",
            pooling.scales.size());
  PVK_CHECK(pooling.areas.size() <= maps, op, ": expected at most ", maps, " areas, but got ", pooling.areas.size());
}

bool is_channels_last(const Tensor& map) {
  return map.stride(1) == 1 && !map.is_contiguous();
}

Tensor pool(const char* op, const Tensors& maps, const Tensor& boxes, int64_t pooled_height, int64_t pooled_width,
            const Pooling& pooling) {
  const Tensor& first = maps[0];
  PVK_CHECK(pooled_height > 0 && pooled_width > 0, op, ": expected output_size to be positive, but got [",
            pooled_height, ", ", pooled_width, "]");
  check_boxes(op, first, boxes, pooling.sampling_ratio);
  const Tensor output = empty({boxes.size(0), first.size(1), pooled_height, pooled_width}, first.scalar_type(), first,
                              pooling.channels_last);
  const DeviceScope scope(first);
  forward(make_params(op, maps, output, boxes, pooling), scope.stream());
  return output;
}

Tensors pool_gradient(const char* op, const Tensor& grad, const Tensor& boxes, int64_t batch_size, int64_t channels,
                      const std::vector<int64_t>& heights, const std::vector<int64_t>& widths, const Pooling& pooling) {
  PVK_CHECK(grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == channels, op,
            ": expected grad to have size [", boxes.size(0), ", ", channels, ", PH, PW], but got ", shape_of(grad));
  PVK_CHECK(grad.size(2) > 0 && grad.size(3) > 0, op, ": expected grad to have bins, but got ", shape_of(grad));
  PVK_CHECK(widths.size() == heights.size(), op, ": expected as many widths as heights");
  check_levels(op, heights.size(), pooling);
  check_boxes(op, grad, boxes, pooling.sampling_ratio);
  Tensors maps;
  for (size_t l = 0; l < heights.size(); ++l) {
    PVK_CHECK(batch_size >= 0 && channels >= 0 && heights[l] >= 0 && widths[l] >= 0, op,
              ": expected sizes that are not negative");
    maps.push_back(
        empty({batch_size, channels, heights[l], widths[l]}, grad.scalar_type(), grad, pooling.channels_last));
  }
  const DeviceScope scope(grad);
  backward(make_params(op, maps, grad, boxes, pooling), scope.stream());
  return maps;
}

Tensor forward_op(const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height,
                  int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  constexpr const char* kOp = "roi_align";
  PVK_CHECK(input.dim() == 4, kOp, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  return pool(kOp, {input}, boxes, pooled_height, pooled_width,
              {{spatial_scale}, {}, sampling_ratio, aligned, is_channels_last(input)});
}

Tensor backward_op(const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t batch_size, int64_t channels,
                   int64_t height, int64_t width, int64_t sampling_ratio, bool aligned, bool channels_last) {
  return pool_gradient("_roi_align_backward", grad, boxes, batch_size, channels, {height}, {width},
                       {{spatial_scale}, {}, sampling_ratio, aligned, channels_last})[0];
}

Tensor multiscale_forward_op(Tensors features, const Tensor& boxes, Numbers scales, Numbers areas,
                             int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio, bool aligned) {
  constexpr const char* kOp = "multiscale_roi_align";
  Pooling pooling{scales, areas, sampling_ratio, aligned, false};
  check_levels(kOp, features.size(), pooling);
  const Tensor& first = features[0];
  for (const Tensor& map : features) {
    PVK_CHECK(map.dim() == 4, kOp, ": expected each of features to have 4 dimensions [N, C, H, W], but got ",
              shape_of(map));
    PVK_CHECK(map.size(0) == first.size(0) && map.size(1) == first.size(1), kOp, ": expected each of features to have ",
              first.size(0), " images and ", first.size(1), " channels as the first has, but got ", shape_of(map));
    PVK_CHECK(map.scalar_type() == first.scalar_type(), kOp, ": expected each of features to be ", first.scalar_type(),
              " as the first is, but got ", map.scalar_type());
    check_same_device(kOp, "each of features", map, "the first", first);
  }
  pooling.channels_last = is_channels_last(first);
  return pool(kOp, features, boxes, pooled_height, pooled_width, pooling);
}

Tensors multiscale_backward_op(const Tensor& grad, const Tensor& boxes, Numbers scales, Numbers areas,
                               int64_t batch_size, int64_t channels, std::vector<int64_t> heights,
                               std::vector<int64_t> widths, int64_t sampling_ratio, bool aligned, bool channels_last) {
  return pool_gradient("_multiscale_roi_align_backward", grad, boxes, batch_size, channels, heights, widths,
                       {scales, areas, sampling_ratio, aligned, channels_last});
}

}  // namespace
}  // namespace pvk::roi_align

PVK_LIBRARY_IMPL(m) {
  m.impl("roi_align", TORCH_BOX(&pvk::roi_align::forward_op));
  m.impl("_roi_align_backward", TORCH_BOX(&pvk::roi_align::backward_op));
  m.impl("multiscale_roi_align", TORCH_BOX(&pvk::roi_align::multiscale_forward_op));
  m.impl("_multiscale_roi_align_backward", TORCH_BOX(&pvk::roi_align::multiscale_backward_op));
}
