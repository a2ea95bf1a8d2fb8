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
  check_as_input(op, "weight", weight, input);
  p.M = input.size(0);
  p.activation = activation_of(op, activation);
  p.bias_dtype = check_channels(op, "bias", constants.bias, input, p.K);
  p.bias = data_of(constants.bias);
  if (residual != nullptr) {
    check_size(op, "residual", *residual, {p.M, p.K});
    check_as_input(op, "residual", *residual, input);
    p.residual = residual->data();
  }
  if (constants.packed) p.packed = packed_data(op, *constants.packed, input, packed_bytes(p, stream), "this weight");
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
                  const OptionalTensor& packed, int64_t activation, bool tf32) {
  constexpr const char* kOp = "linear";
  PVK_CHECK(input.dim() == 2, kOp, ": expected input to have 2 dimensions [M, C], but got ", shape_of(input));
  PVK_CHECK(!residual || residual->dim() == 2, kOp, ": expected residual to have 2 dimensions, but got ",
            shape_of(*residual));
  const DeviceScope scope(input);
  Constants constants{weight, bias, packed};
  const View added = residual ? View(*residual) : View();
  LinearParams p = prepare(kOp, input, constants, residual ? &added : nullptr, activation, scope.stream());
  p.tf32 = tf32;
  const Tensor output = empty({p.M, p.K}, input.scalar_type(), input);
#if defined(PVK_CUDA) || defined(PVK_SIMT)
  const Tensor workspace = workspace_of(p, input);
#endif
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
