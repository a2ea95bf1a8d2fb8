// Binding of conv2d: tensors -> checks -> Conv2dParams -> the backend's kernel.
#include "ops/conv2d/binding.h"

#include <vector>

namespace pvk::conv2d {
namespace {

constexpr int64_t kLargest = int64_t(1) << 31;  // of strides, dilations and paddings: products fit int64

// Numbers of pyvision_kernels/ops/conv2d/geometry.py, in its order.
struct Geometry {
  int64_t stride_h, stride_w, left, right, top, bottom, dilation_h, dilation_w, groups, padding_mode;
};

Geometry geometry_of(const int64_t* n) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
}

void check_geometry(const char* op, const std::vector<int64_t>& numbers) {
  PVK_CHECK(numbers.size() == kGeometryNumbers, op, ": expected geometry to have 10 numbers, but got ", numbers.size());
}

void check_weight(const char* op, const Tensor& weight, const Geometry& g) {
  PVK_CHECK(weight.dim() == 4, op, ": expected weight to have 4 dimensions [K, C / groups, R, S], but got ",
            shape_of(weight));
  PVK_CHECK(g.groups > 0, op, ": expected groups to be positive, but got ", g.groups);
  PVK_CHECK(weight.size(0) % g.groups == 0, op, ": expected weight to have output channels in a multiple of groups ",
            g.groups, ", but got ", shape_of(weight));
  PVK_CHECK(weight.size(2) > 0 && weight.size(3) > 0, op, ": expected weight to have at least one tap, but got ",
            shape_of(weight));
}

// Rows (or columns) of the result.
int64_t output_size(const char* op, const char* axis, int64_t size, int64_t before, int64_t after, int64_t taps,
                    int64_t stride, int64_t dilation, int64_t mode) {
  PVK_CHECK(stride > 0 && stride < kLargest, op, ": expected stride to be positive, but got ", stride);
  PVK_CHECK(dilation > 0 && dilation < kLargest, op, ": expected dilation to be positive, but got ", dilation);
  PVK_CHECK(before >= 0 && after >= 0 && before < kLargest && after < kLargest, op,
            ": expected padding not to be negative, but got ", before, " and ", after);
  const int64_t most = before > after ? before : after;
  if (PaddingMode(mode) == PaddingMode::kReflect) {
    PVK_CHECK(most < size || most == 0, op, ": expected padding to be below the ", axis, " of input, ", size,
              ", to reflect it, but got ", most);
  } else if (PaddingMode(mode) == PaddingMode::kCircular) {
    PVK_CHECK(most <= size, op, ": expected padding to be at most the ", axis, " of input, ", size, ", but got ", most);
  } else if (PaddingMode(mode) == PaddingMode::kReplicate) {
    PVK_CHECK(size > 0 || most == 0, op, ": expected input to have a ", axis, " to replicate, but got 0");
  }
  const int64_t padded = size + before + after, reach = dilation * (taps - 1) + 1;
  PVK_CHECK(padded >= reach, op, ": expected input to have a padded ", axis, " of at least ", reach,
            ", the reach of weight, but got ", padded);
  return (padded - reach) / stride + 1;
}

void fill_geometry(Conv2dParams& p, const Geometry& g) {
  p.groups = g.groups;
  p.stride[0] = g.stride_h;
  p.stride[1] = g.stride_w;
  p.dilation[0] = g.dilation_h;
  p.dilation[1] = g.dilation_w;
  p.padding_top = g.top;
  p.padding_left = g.left;
  p.padding_mode = PaddingMode(g.padding_mode);
}

Algorithm algorithm_of(const char* op, int64_t algorithm) {
#if defined(PVK_CUDA) || defined(PVK_SIMT)
  constexpr Algorithm kLast = Algorithm::kTf32;
#else
  constexpr Algorithm kLast = Algorithm::kFewChannels;
#endif
  PVK_CHECK(algorithm >= 0 && algorithm <= int64_t(kLast), op, ": expected algorithm to be 0 to ", int64_t(kLast),
            ", but got ", algorithm);
  return Algorithm(algorithm);
}

void fill_weight(Conv2dParams& p, const char* op, const Tensor& weight, const Geometry& g, int64_t algorithm) {
  p.weight = data_of(weight);
  p.dtype = dtype_of(op, "weight", weight);
  p.K = weight.size(0);
  p.C = weight.size(1) * g.groups;
  p.R = weight.size(2);
  p.S = weight.size(3);
  fill_geometry(p, g);
  for (int i = 0; i < 4; ++i) p.weight_stride[i] = weight.stride(i);
  p.algorithm = algorithm_of(op, algorithm);
  const bool unit = p.stride[0] == 1 && p.stride[1] == 1 && p.dilation[0] == 1 && p.dilation[1] == 1;
  const bool winograd = p.algorithm == Algorithm::kWinograd2 || p.algorithm == Algorithm::kWinograd4;
  PVK_CHECK(!winograd || (unit && p.R == 3 && p.S == 3 && p.groups == 1), op,
            ": expected a 3 x 3 weight, stride 1, dilation 1 and groups 1 for Winograd");
  PVK_CHECK(p.algorithm != Algorithm::kDepthwise || weight.size(1) == 1, op,
            ": expected one input channel a group for the depthwise algorithm");
  PVK_CHECK(p.algorithm != Algorithm::kFewChannels || p.groups == 1, op,
            ": expected groups 1 for the algorithm of few channels");
}

}  // namespace

Conv2dParams prepare(const char* op, const View& input, Constants& constants, const View* residual, const Call& call,
                     Stream stream) {
  const Tensor& weight = constants.weight;
  const Geometry g = geometry_of(call.geometry);
  PVK_CHECK(input.dim() == 4, op, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  check_weight(op, weight, g);
  PVK_CHECK(input.size(1) == weight.size(1) * g.groups, op, ": expected input to have ", weight.size(1) * g.groups,
            " channels as weight and groups have, but got ", shape_of(input));
  check_as_input(op, "weight", weight, input);
  PVK_CHECK(g.padding_mode >= 0 && g.padding_mode <= int64_t(PaddingMode::kCircular), op,
            ": expected padding_mode to be 0 to 3, but got ", g.padding_mode);
  Conv2dParams p{};
  p.activation = activation_of(op, call.activation);
  p.N = input.size(0);
  p.H = input.size(2);
  p.W = input.size(3);
  p.OH = output_size(op, "height", p.H, g.top, g.bottom, weight.size(2), g.stride_h, g.dilation_h, g.padding_mode);
  p.OW = output_size(op, "width", p.W, g.left, g.right, weight.size(3), g.stride_w, g.dilation_w, g.padding_mode);
  PVK_CHECK(!call.pool || (p.OH > 1 && p.OW > 1), op, ": expected at least 2 x 2 pixels to pool, but got [", p.OH, ", ",
            p.OW, "]");
  p.pool = call.pool;
  const int64_t channels = weight.size(0);
  p.bias_dtype = check_channels(op, "bias", constants.bias, input, channels);
  p.scale_dtype = check_channels(op, "scale", constants.scale, input, channels);
  const DType shift_dtype = check_channels(op, "shift", constants.shift, input, channels);
  PVK_CHECK(!constants.scale || !constants.shift || p.scale_dtype == shift_dtype, op, ": expected shift to be ",
            constants.scale->scalar_type(), " as scale is, but got ", constants.shift->scalar_type());
  if (constants.shift) p.scale_dtype = shift_dtype;
  if (residual != nullptr) {
    check_size(op, "residual", *residual, {p.N, channels, p.OH, p.OW});
    check_as_input(op, "residual", *residual, input);
  }
  fill_weight(p, op, weight, g, call.algorithm);
  if (constants.packed)
    p.packed = packed_data(op, *constants.packed, input, packed_bytes(p, stream), "this weight and algorithm");
  p.input = input.data();
  p.bias = data_of(constants.bias);
  p.scale = data_of(constants.scale);
  p.shift = data_of(constants.shift);
  p.residual = residual != nullptr ? residual->data() : nullptr;
  for (int i = 0; i < 4; ++i) {
    p.input_stride[i] = input.stride(i);
    p.residual_stride[i] = residual != nullptr ? residual->stride(i) : 0;
  }
  return p;
}

void run(Conv2dParams& p, const View& output, Stream stream) {
  if (output.numel() == 0) return;
  p.output = output.data();
  for (int i = 0; i < 4; ++i) p.output_stride[i] = output.stride(i);
  forward(p, stream);
}

#if defined(PVK_CUDA) || defined(PVK_SIMT)
namespace {

void check_gradient(const char* op, const Tensor& grad_output, const Geometry& g) {
  PVK_CHECK(grad_output.dim() == 4, op, ": expected grad_output to have 4 dimensions [N, K, OH, OW], but got ",
            shape_of(grad_output));
  PVK_CHECK(PaddingMode(g.padding_mode) == PaddingMode::kZeros, op, ": expected padding_mode to be 0, but got ",
            g.padding_mode);
}

// N, H, W, OH, OW and grad_output, of the sizes of the input and of K outputs.
template <typename Params>
void fill_gradient(Params& p, const char* op, const Tensor& grad_output, const Geometry& g, int64_t images,
                   int64_t height, int64_t width, int64_t outputs, int64_t rows, int64_t columns) {
  p.N = images;
  p.H = height;
  p.W = width;
  p.OH = output_size(op, "height", p.H, g.top, g.bottom, rows, g.stride_h, g.dilation_h, g.padding_mode);
  p.OW = output_size(op, "width", p.W, g.left, g.right, columns, g.stride_w, g.dilation_w, g.padding_mode);
  check_size(op, "grad_output", grad_output, {p.N, outputs, p.OH, p.OW});
  p.grad_output = data_of(grad_output);
  for (int i = 0; i < 4; ++i) p.grad_output_stride[i] = grad_output.stride(i);
}

Tensor backward_input_op(const Tensor& grad_output, const Tensor& weight, OptionalTensor bias,
                         const std::vector<int64_t>& numbers, const std::vector<int64_t>& size, int64_t activation,
                         bool channels_last, int64_t algorithm) {
  constexpr const char* kOp = "_conv2d_backward_input";
  check_geometry(kOp, numbers);
  const Geometry g = geometry_of(numbers.data());
  const DeviceScope scope(grad_output);
  check_gradient(kOp, grad_output, g);
  check_weight(kOp, weight, g);
  check_as_input(kOp, "weight", weight, grad_output, "grad_output");
  PVK_CHECK(size.size() == 2 && size[0] >= 0 && size[1] >= 0, kOp, ": expected size to be two sizes [H, W]");
  BackwardInputParams p{};
  fill_weight(p, kOp, weight, g, algorithm);
  fill_gradient(p, kOp, grad_output, g, grad_output.size(0), size[0], size[1], p.K, p.R, p.S);
  p.activation = activation_of(kOp, activation);
  p.bias_dtype = check_channels(kOp, "bias", bias, grad_output, p.C);
  p.bias = data_of(bias);
  const Tensor grad_input = empty({p.N, p.C, p.H, p.W}, weight.scalar_type(), weight, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  p.grad_input = data_of(grad_input);
  for (int i = 0; i < 4; ++i) p.grad_input_stride[i] = grad_input.stride(i);
  const Tensor workspace = workspace_of(p, weight);
  backward_input(p, scope.stream());
  return grad_input;
}

Tensor backward_weight_op(const Tensor& grad_output, const Tensor& input, const std::vector<int64_t>& numbers,
                          const std::vector<int64_t>& taps, bool channels_last, int64_t algorithm) {
  constexpr const char* kOp = "_conv2d_backward_weight";
  check_geometry(kOp, numbers);
  const Geometry g = geometry_of(numbers.data());
  const DeviceScope scope(grad_output);
  check_gradient(kOp, grad_output, g);
  PVK_CHECK(input.dim() == 4, kOp, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  check_as_input(kOp, "input", input, grad_output, "grad_output");
  PVK_CHECK(taps.size() == 2 && taps[0] > 0 && taps[1] > 0, kOp, ": expected taps to be two positive sizes [R, S]");
  PVK_CHECK(g.groups > 0 && input.size(1) % g.groups == 0 && grad_output.size(1) % g.groups == 0, kOp,
            ": expected channels in multiples of groups ", g.groups, ", but got ", shape_of(input), " and ",
            shape_of(grad_output));
  BackwardWeightParams p{};
  p.dtype = dtype_of(kOp, "input", input);
  p.algorithm = algorithm_of(kOp, algorithm);
  p.K = grad_output.size(1);
  p.C = input.size(1);
  p.R = taps[0];
  p.S = taps[1];
  fill_geometry(p, g);
  fill_gradient(p, kOp, grad_output, g, input.size(0), input.size(2), input.size(3), p.K, p.R, p.S);
  p.input = data_of(input);
  for (int i = 0; i < 4; ++i) p.input_stride[i] = input.stride(i);
  const Tensor grad_weight = empty({p.K, p.C / p.groups, p.R, p.S}, input.scalar_type(), input, channels_last);
  if (grad_weight.numel() == 0) return grad_weight;
  p.grad_weight = data_of(grad_weight);
  for (int i = 0; i < 4; ++i) p.grad_weight_stride[i] = grad_weight.stride(i);
  const Tensor workspace = workspace_of(p, input);
  backward_weight(p, scope.stream());
  return grad_weight;
}

}  // namespace
#endif

namespace {

Tensor forward_op(const Tensor& input, const Tensor& weight, OptionalTensor bias, OptionalTensor scale,
                  OptionalTensor shift, const OptionalTensor& residual, const OptionalTensor& packed,
                  const std::vector<int64_t>& geometry, int64_t activation, bool pool, bool channels_last,
                  int64_t algorithm) {
  const char* const op = pool ? "conv2d_max_pool2d" : "conv2d";
  PVK_CHECK(input.dim() == 4, op, ": expected input to have 4 dimensions [N, C, H, W], but got ", shape_of(input));
  PVK_CHECK(!residual || residual->dim() == 4, op, ": expected residual to have 4 dimensions, but got ",
            shape_of(*residual));
  check_geometry(op, geometry);
  const DeviceScope scope(input);
  Constants constants{weight, bias, scale, shift, packed};
  const View added = residual ? View(*residual) : View();
  Conv2dParams p = prepare(op, input, constants, residual ? &added : nullptr,
                           {geometry.data(), activation, pool, algorithm}, scope.stream());
  const Tensor output = empty({p.N, p.K, p.rows_out(), p.columns_out()}, input.scalar_type(), input, channels_last);
#if defined(PVK_CUDA) || defined(PVK_SIMT)
  const Tensor workspace = workspace_of(p, input);
#endif
  run(p, output, scope.stream());
  return output;
}

Tensor pack_op(const Tensor& weight, const std::vector<int64_t>& geometry, int64_t algorithm) {
  constexpr const char* kPack = "_conv2d_pack";
  check_geometry(kPack, geometry);
  const Geometry g = geometry_of(geometry.data());
  check_weight(kPack, weight, g);
  PackParams p{};
  const DeviceScope scope(weight);
  fill_weight(p, kPack, weight, g, algorithm);
  const Tensor packed = empty({packed_bytes(p, scope.stream())}, ScalarType::Byte, weight);
  if (packed.numel() == 0) return packed;
  p.target = data_of(packed);
  pack(p, scope.stream());
  return packed;
}

}  // namespace
}  // namespace pvk::conv2d

PVK_LIBRARY_IMPL(m) {
  m.impl("conv2d", TORCH_BOX(&pvk::conv2d::forward_op));
  m.impl("_conv2d_pack", TORCH_BOX(&pvk::conv2d::pack_op));
#if defined(PVK_CUDA) || defined(PVK_SIMT)
  m.impl("_conv2d_backward_input", TORCH_BOX(&pvk::conv2d::backward_input_op));
  m.impl("_conv2d_backward_weight", TORCH_BOX(&pvk::conv2d::backward_weight_op));
#endif
}
