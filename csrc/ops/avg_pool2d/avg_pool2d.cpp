// Binding of avg_pool2d: tensors -> checks -> AvgPool2dParams -> the backend's kernel.
#include "ops/avg_pool2d/avg_pool2d.h"

#include "core/pool_binding.h"

namespace pvk::avg_pool2d {
namespace {

AvgPool2dParams make_params(const char* op, const Tensor& map, const Tensor& pooled, const PoolAxis& rows,
                            const PoolAxis& columns, bool count_padding, int64_t divisor, bool channels_last) {
  AvgPool2dParams p{};
  p.map = data_of(map);
  p.pooled = data_of(pooled);
  p.dtype = dtype_of(op, "input", map);
  p.N = map.size(0);
  p.C = map.size(1);
  p.rows = rows;
  p.columns = columns;
  p.count_padding = count_padding;
  p.divisor = divisor;
  for (int i = 0; i < 4; ++i) {
    p.map_stride[i] = map.stride(i);
    p.pooled_stride[i] = pooled.stride(i);
  }
  p.channels_last = channels_last;
  return p;
}

void check_unit_dilation(const char* op, const PoolAxis& rows, const PoolAxis& columns) {
  PVK_CHECK(rows.dilation == 1 && columns.dilation == 1, op, ": expected dilation to be 1, but got ", rows.dilation,
            " and ", columns.dilation);
}

Tensor forward_op(const Tensor& input, const std::vector<int64_t>& window, int64_t rows, int64_t columns,
                  bool count_include_pad, int64_t divisor) {
  constexpr const char* kOp = "avg_pool2d";
  PVK_CHECK(input.dim() == 4, kOp, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  const PoolAxis row_axis = pool_axis(kOp, window, 0, input.size(2), rows);
  const PoolAxis column_axis = pool_axis(kOp, window, 1, input.size(3), columns);
  check_unit_dilation(kOp, row_axis, column_axis);
  const bool channels_last = pools_channels_last(input);
  const Tensor output = empty({input.size(0), input.size(1), rows, columns}, input.scalar_type(), input, channels_last);
  const DeviceScope scope(input);
  const Tensor map = pool_readable(input, channels_last);
  const AvgPool2dParams p =
      make_params(kOp, map, output, row_axis, column_axis, count_include_pad, divisor, channels_last);
  if (output.numel() != 0) forward(p, scope.stream());
  return output;
}

Tensor backward_op(const Tensor& grad, const std::vector<int64_t>& window, int64_t height, int64_t width,
                   bool count_include_pad, int64_t divisor, bool channels_last) {
  constexpr const char* kOp = "_avg_pool2d_backward";
  PVK_CHECK(grad.dim() == 4, kOp, ": expected grad to have 4 dimensions [N, C, OH, OW], but got ", shape_of(grad));
  const PoolAxis rows = pool_axis(kOp, window, 0, height, grad.size(2));
  const PoolAxis columns = pool_axis(kOp, window, 1, width, grad.size(3));
  check_unit_dilation(kOp, rows, columns);
  const Tensor grad_input = empty({grad.size(0), grad.size(1), height, width}, grad.scalar_type(), grad, channels_last);
  const DeviceScope scope(grad);
  const Tensor dense_grad = pool_dense(grad, channels_last);
  const AvgPool2dParams p =
      make_params(kOp, grad_input, dense_grad, rows, columns, count_include_pad, divisor, channels_last);
  if (grad_input.numel() != 0) backward(p, scope.stream());
  return grad_input;
}

}  // namespace
}  // namespace pvk::avg_pool2d

PVK_LIBRARY_IMPL(m) {
  m.impl("avg_pool2d", TORCH_BOX(&pvk::avg_pool2d::forward_op));
  m.impl("_avg_pool2d_backward", TORCH_BOX(&pvk::avg_pool2d::backward_op));
}
