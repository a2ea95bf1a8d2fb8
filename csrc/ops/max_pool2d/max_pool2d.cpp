// Binding of max_pool2d: tensors -> checks -> parameters -> the backend's kernel.
#include "ops/max_pool2d/max_pool2d.h"

#include <tuple>

#include "core/pool_binding.h"

namespace pvk::max_pool2d {
namespace {

MaxPool2dParams make_params(const char* op, const Tensor& map, const Tensor& pooled, bool channels_last) {
  MaxPool2dParams p{};
  p.map = data_of(map);
  p.pooled = data_of(pooled);
  p.dtype = dtype_of(op, "input", map);
  p.N = map.size(0);
  p.C = map.size(1);
  for (int i = 0; i < 4; ++i) {
    p.map_stride[i] = map.stride(i);
    p.pooled_stride[i] = pooled.stride(i);
  }
  p.channels_last = channels_last;
  return p;
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& input, const std::vector<int64_t>& window, int64_t rows,
                                      int64_t columns, bool with_places) {
  constexpr const char* kOp = "max_pool2d";
  PVK_CHECK(input.dim() == 4, kOp, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  const PoolAxis row_axis = pool_axis(kOp, window, 0, input.size(2), rows);
  const PoolAxis column_axis = pool_axis(kOp, window, 1, input.size(3), columns);
  check_pool_pixels(kOp, input.size(2), input.size(3));
  const bool channels_last = pools_channels_last(input);
  const std::initializer_list<int64_t> size{input.size(0), input.size(1), rows, columns};
  const Tensor output = empty(size, input.scalar_type(), input, channels_last);
  const Tensor places =
      with_places ? empty(size, ScalarType::Int, input, channels_last) : empty({0}, ScalarType::Int, input);
  const DeviceScope scope(input);
  const Tensor map = pool_readable(input, channels_last);
  MaxPool2dParams p = make_params(kOp, map, output, channels_last);
  if (with_places) p.places = static_cast<int32_t*>(data_of(places));
  p.rows = row_axis;
  p.columns = column_axis;
  if (output.numel() != 0) forward(p, scope.stream());
  return {output, places};
}

Tensor backward_op(const Tensor& grad, const Tensor& places, const std::vector<int64_t>& window, int64_t height,
                   int64_t width, bool channels_last) {
  constexpr const char* kOp = "_max_pool2d_backward";
  PVK_CHECK(grad.dim() == 4, kOp, ": expected grad to have 4 dimensions [N, C, OH, OW], but got ", shape_of(grad));
  PVK_CHECK(shape_of(places) == shape_of(grad), kOp, ": expected places to have the size of grad, ", shape_of(grad),
            ", but got ", shape_of(places));
  PVK_CHECK(places.scalar_type() == ScalarType::Int, kOp, ": expected places to be int32, but got ",
            places.scalar_type());
  check_same_device(kOp, "places", places, "grad", grad);
  const PoolAxis rows = pool_axis(kOp, window, 0, height, grad.size(2));
  const PoolAxis columns = pool_axis(kOp, window, 1, width, grad.size(3));
  check_pool_pixels(kOp, height, width);
  const Tensor grad_input = empty({grad.size(0), grad.size(1), height, width}, grad.scalar_type(), grad, channels_last);
  const DeviceScope scope(grad);
  const Tensor dense_grad = pool_dense(grad, channels_last), dense_places = pool_dense(places, channels_last);
  MaxPool2dParams p = make_params(kOp, grad_input, dense_grad, channels_last);
  p.places = static_cast<int32_t*>(data_of(dense_places));
  p.rows = rows;
  p.columns = columns;
  if (grad_input.numel() != 0) backward(p, scope.stream());
  return grad_input;
}

Tensor unpool_op(const Tensor& input, const Tensor& indices, int64_t height, int64_t width) {
  constexpr const char* kOp = "max_unpool2d";
  PVK_CHECK(input.dim() == 4, kOp, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  PVK_CHECK(shape_of(indices) == shape_of(input), kOp, ": expected indices to have the size of input, ",
            shape_of(input), ", but got ", shape_of(indices));
  PVK_CHECK(indices.scalar_type() == ScalarType::Long, kOp, ": expected indices to be int64, but got ",
            indices.scalar_type());
  check_same_device(kOp, "indices", indices, "input", input);
  PVK_CHECK(height >= 0 && width >= 0, kOp, ": expected output_size not to be negative, but got [", height, ", ", width,
            "]");
  check_pool_pixels(kOp, height, width);
  check_pool_pixels(kOp, input.size(2), input.size(3));
  const bool channels_last = pools_channels_last(input);
  const Tensor output = empty({input.size(0), input.size(1), height, width}, input.scalar_type(), input, channels_last);
  const DeviceScope scope(input);
  const Tensor dense_input = pool_dense(input, channels_last), dense_indices = pool_dense(indices, channels_last);
  MaxUnpool2dParams p{};
  p.input = data_of(dense_input);
  p.places = static_cast<const int64_t*>(data_of(dense_indices));
  p.output = data_of(output);
  p.dtype = dtype_of(kOp, "input", input);
  p.N = input.size(0);
  p.C = input.size(1);
  p.pixels_in = input.size(2) * input.size(3);
  p.pixels_out = height * width;
  p.channels_last = channels_last;
  const Tensor owner = empty({owner_elements(p, scope.stream())}, ScalarType::Int, input);
  p.owner = static_cast<int32_t*>(data_of(owner));
  const int64_t outside = unpool(p, scope.stream());
  PVK_CHECK(outside < 0, kOp, ": expected indices to lie in an output of ", height, " x ", width, " pixels, but got ",
            p.places[outside]);
  return output;
}

}  // namespace
}  // namespace pvk::max_pool2d

PVK_LIBRARY_IMPL(m) {
  m.impl("max_pool2d", TORCH_BOX(&pvk::max_pool2d::forward_op));
  m.impl("_max_pool2d_backward", TORCH_BOX(&pvk::max_pool2d::backward_op));
  m.impl("max_unpool2d", TORCH_BOX(&pvk::max_pool2d::unpool_op));
}
