// Binding of linear: tensors -> checks -> LinearParams -> the backend's kernel.
#include "ops/linear/binding.h"

namespace pvk::linear {
namespace {

void fill_weight(LinearParams& p, const char* op, const Tensor& weight) {
  PVK_CHECK(weight.dim() == 2, op, ": expected weight to have 2 dimensions [K, C], but got ", shape_of(weight));
  p.weight = data_of(weight);
  p.dtype = dtype_of(op, "weight", weight);
  p.K = weight.size(0);
  p.C = weight.size(1);
  for (int i = 0; i < 2; ++i) p.weight_stride[i] = weight.stride(i);
}

}  // namespace

LinearParams prepare(const char* op, const View& input, Constants& constants, const View* residual, int64_t activation,
                     Stream stream) {
  const Tensor& weight = constants.weight;
  LinearParams p{};
  fill_weight(p, op, weight);
  PVK_CHECK(input.dim() == 2 && input.size(1) == p.C, op, ": expected input to have size [M, ", p.C,
            "] as weight has, but got ", shape_of(input));
  PVK_CHECK(input.scalar_type() == weight.scalar_type(), op, ": expected weight to be ", input.scalar_type(),
            " as input is, but got ", weight.scalar_type());
  check_same_device(op, "weight", weight, "input", input);
  PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kSigmoid), op,
            ": expected activation to be 0 to 6, but got ", activation);
  p.M = input.size(0);
  p.activation = Activation(activation);
  p.bias_dtype = p.dtype;
  if (constants.bias) {
    Tensor& bias = *constants.bias;
    PVK_CHECK(bias.dim() == 1 && bias.size(0) == p.K, op, ": expected bias to have size [", p.K, "], but got ",
              shape_of(bias));
    PVK_CHECK(bias.scalar_type() == input.scalar_type() ||
                  (bias.scalar_type() == ScalarType::Float && input.scalar_type() != ScalarType::Double),
              op, ": expected bias to be ", input.scalar_type(),
              " as input is, or float32 beside a 16-bit input, but got ", bias.scalar_type());
    check_same_device(op, "bias", bias, "input", input);
    p.bias_dtype = dtype_of(op, "bias", bias);
    if (!bias.is_contiguous()) bias = torch::stable::contiguous(bias);
    p.bias = data_of(bias);
  }
  if (residual != nullptr) {
    PVK_CHECK(residual->dim() == 2 && residual->size(0) == p.M && residual->size(1) == p.K, op,
              ": expected residual to have size [", p.M, ", ", p.K, "], but got ", shape_of(*residual));
    PVK_CHECK(residual->scalar_type() == input.scalar_type(), op, ": expected residual to be ", input.scalar_type(),
              " as input is, but got ", residual->scalar_type());
    check_same_device(op, "residual", *residual, "input", input);
    p.residual = residual->data();
  }
  if (constants.packed) {
    const Tensor& packed = *constants.packed;
    check_same_device(op, "packed", packed, "input", input);
    const int64_t bytes = packed_bytes(p, stream);
    PVK_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == bytes, op,
              ": expected packed to be ", bytes, " bytes of this weight, but got ", shape_of(packed));
    if (bytes > 0) p.packed = data_of(packed);
  }
  p.input = input.data();
  for (int i = 0; i < 2; ++i) {
    p.input_stride[i] = input.stride(i);
    p.residual_stride[i] = residual != nullptr ? residual->stride(i) : 0;
  }
  return p;
}

void run(LinearParams& p, const View& output, Stream stream) {
  if (output.numel() == 0) return;
  p.output = output.data();
  forward(p, stream);
}

namespace {

Tensor forward_op(const Tensor& input, const Tensor& weight, OptionalTensor bias, const OptionalTensor& residual,
                  const OptionalTensor& packed, int64_t activation) {
  constexpr const char* kOp = "linear";
  PVK_CHECK(input.dim() == 2, kOp, ": expected input to have 2 dimensions [M, C], but got ", shape_of(input));
  PVK_CHECK(!residual || residual->dim() == 2, kOp, ": expected residual to have 2 dimensions, but got ",
            shape_of(*residual));
  const DeviceScope scope(input);
  Constants constants{weight, bias, packed};
  const View added = residual ? View(*residual) : View();
  LinearParams p = prepare(kOp, input, constants, residual ? &added : nullptr, activation, scope.stream());
  const Tensor output = empty({p.M, p.K}, input.scalar_type(), input);
  run(p, output, scope.stream());
  return output;
}

Tensor pack_op(const Tensor& weight) {
  PackParams p{};
  const DeviceScope scope(weight);
  fill_weight(p, "_linear_pack", weight);
  const Tensor packed = empty({packed_bytes(p, scope.stream())}, ScalarType::Byte, weight);
  if (packed.numel() == 0) return packed;
  p.target = data_of(packed);
  pack(p, scope.stream());
  return packed;
}

}  // namespace
}  // namespace pvk::linear

PVK_LIBRARY_IMPL(m) {
  m.impl("linear", TORCH_BOX(&pvk::linear::forward_op));
  m.impl("_linear_pack", TORCH_BOX(&pvk::linear::pack_op));
}
