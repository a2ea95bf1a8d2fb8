// Binding of linear: tensors -> checks -> LinearParams -> the backend's kernel.
#include "ops/linear/linear.h"

#include "core/binding.h"

namespace pvk::linear {
namespace {

using OptionalTensor = std::optional<Tensor>;

void fill_weight(LinearParams& p, const char* op, const Tensor& weight) {
  PVK_CHECK(weight.dim() == 2, op, ": expected weight to have 2 dimensions [K, C], but got ", shape_of(weight));
  p.weight = data_of(weight);
  p.dtype = dtype_of(op, "weight", weight);
  p.K = weight.size(0);
  p.C = weight.size(1);
  for (int i = 0; i < 2; ++i) p.weight_stride[i] = weight.stride(i);
}

Tensor forward_op(const Tensor& input, const Tensor& weight, OptionalTensor bias, const OptionalTensor& residual,
                  const OptionalTensor& packed, int64_t activation) {
  constexpr const char* kOp = "linear";
  const DeviceScope scope(input);
  LinearParams p{};
  fill_weight(p, kOp, weight);
  PVK_CHECK(input.dim() == 2 && input.size(1) == p.C, kOp, ": expected input to have size [M, ", p.C,
            "] as weight has, but got ", shape_of(input));
  PVK_CHECK(input.scalar_type() == weight.scalar_type(), kOp, ": expected weight to be ", input.scalar_type(),
            " as input is, but got ", weight.scalar_type());
  check_same_device(kOp, "weight", weight, "input", input);
  PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kSigmoid), kOp,
            ": expected activation to be 0 to 6, but got ", activation);
  p.M = input.size(0);
  p.activation = Activation(activation);
  p.bias_dtype = p.dtype;
  if (bias) {
    PVK_CHECK(bias->dim() == 1 && bias->size(0) == p.K, kOp, ": expected bias to have size [", p.K, "], but got ",
              shape_of(*bias));
    PVK_CHECK(bias->scalar_type() == input.scalar_type() ||
                  (bias->scalar_type() == ScalarType::Float && input.scalar_type() != ScalarType::Double),
              kOp, ": expected bias to be ", input.scalar_type(),
              " as input is, or float32 beside a 16-bit input, but got ", bias->scalar_type());
    check_same_device(kOp, "bias", *bias, "input", input);
    p.bias_dtype = dtype_of(kOp, "bias", *bias);
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
  }
  if (residual) {
    PVK_CHECK(residual->dim() == 2 && residual->size(0) == p.M && residual->size(1) == p.K, kOp,
              ": expected residual to have size [", p.M, ", ", p.K, "], but got ", shape_of(*residual));
    PVK_CHECK(residual->scalar_type() == input.scalar_type(), kOp, ": expected residual to be ", input.scalar_type(),
              " as input is, but got ", residual->scalar_type());
    check_same_device(kOp, "residual", *residual, "input", input);
  }
  if (packed) {
    check_same_device(kOp, "packed", *packed, "input", input);
    const int64_t bytes = packed_bytes(p, scope.stream());
    PVK_CHECK(packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() && packed->numel() == bytes, kOp,
              ": expected packed to be ", bytes, " bytes of this weight, but got ", shape_of(*packed));
    if (bytes > 0) p.packed = data_of(*packed);
  }
  const Tensor output = empty({p.M, p.K}, input.scalar_type(), input);
  if (output.numel() == 0) return output;
  p.input = data_of(input);
  p.bias = bias ? data_of(*bias) : nullptr;
  p.residual = residual ? data_of(*residual) : nullptr;
  p.output = data_of(output);
  for (int i = 0; i < 2; ++i) {
    p.input_stride[i] = input.stride(i);
    p.residual_stride[i] = residual ? residual->stride(i) : 0;
  }
  forward(p, scope.stream());
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
