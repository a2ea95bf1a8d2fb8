// Binding of interpolate: tensors -> checks -> InterpolateParams -> the backend's kernel.
#include "ops/interpolate/interpolate.h"

#include "core/pool_binding.h"

namespace pvk::interpolate {
namespace {

ResizeAxis axis_of(const char* op, const std::vector<int64_t>& filters, int axis, int64_t size, int64_t outputs,
                   bool align_corners, double factor) {
  constexpr int64_t kMost = 2147483647;
  PVK_CHECK(filters.size() == 2, op, ": expected filters to have 2 numbers, but got ", filters.size());
  const int64_t filter = filters[size_t(axis)];
  PVK_CHECK(filter >= 0 && filter <= int64_t(Filter::kCubicAntialias), op, ": expected filters to be 0 to 5, but got ",
            filter);
  PVK_CHECK(size >= 1 && size <= kMost && outputs >= 1 && outputs <= kMost, op,
            ": expected rows and columns in [1, 2147483647], but got ", size, " and ", outputs);
  PVK_CHECK(factor >= 0 && factor - factor == 0, op, ": expected a finite scale_factor, but got ", factor);
  ResizeAxis a{size, outputs, Filter(filter), align_corners, factor};
  a.align_corners = align_corners && !a.chooses();
  return a;
}

Tensor run(const char* op, const Tensor& given, const std::vector<int64_t>& filters, int64_t rows, int64_t columns,
           bool align_corners, double row_factor, double column_factor, bool channels_last, bool backward) {
  InterpolateParams p{};
  p.dtype = dtype_of(op, backward ? "grad" : "input", given);
  p.N = given.size(0);
  p.C = given.size(1);
  const int64_t height = given.size(2), width = given.size(3);
  const auto axis = [&](int which, int64_t before, int64_t after, double factor) {
    return axis_of(op, filters, which, backward ? after : before, backward ? before : after, align_corners, factor);
  };
  p.rows = axis(0, height, rows, row_factor);
  p.columns = axis(1, width, columns, column_factor);
  p.backward = backward;
  p.channels_last = channels_last;
  const Tensor result = empty({p.N, p.C, rows, columns}, given.scalar_type(), given, channels_last);
  const DeviceScope scope(given);
  if (result.numel() == 0) return result;
  const Tensor from = backward ? pool_dense(given, channels_last) : pool_readable(given, channels_last);
  for (int i = 0; i < 4; ++i) {
    p.from_stride[i] = from.stride(i);
    p.to_stride[i] = result.stride(i);
  }
  p.from = data_of(from);
  p.to = data_of(result);
  const int64_t bytes = scratch_bytes(p);
  const Tensor scratch = bytes > 0 ? empty({bytes}, ScalarType::Byte, given) : Tensor();
  p.scratch = bytes > 0 ? data_of(scratch) : nullptr;
  resize(p, scope.stream());
  return result;
}

Tensor forward_op(const Tensor& input, const std::vector<int64_t>& filters, int64_t rows, int64_t columns,
                  bool align_corners, double row_factor, double column_factor) {
  constexpr const char* kOp = "interpolate";
  PVK_CHECK(input.dim() == 4, kOp, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  return run(kOp, input, filters, rows, columns, align_corners, row_factor, column_factor, pools_channels_last(input),
             false);
}

Tensor backward_op(const Tensor& grad, const std::vector<int64_t>& filters, int64_t height, int64_t width,
                   bool align_corners, double row_factor, double column_factor, bool channels_last) {
  constexpr const char* kOp = "_interpolate_backward";
  PVK_CHECK(grad.dim() == 4, kOp, ": expected grad to have 4 dimensions [N, C, OH, OW], but got ", shape_of(grad));
  return run(kOp, grad, filters, height, width, align_corners, row_factor, column_factor, channels_last, true);
}

}  // namespace
}  // namespace pvk::interpolate

PVK_LIBRARY_IMPL(m) {
  m.impl("interpolate", TORCH_BOX(&pvk::interpolate::forward_op));
  m.impl("_interpolate_backward", TORCH_BOX(&pvk::interpolate::backward_op));
}
