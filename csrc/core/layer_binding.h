// What the bindings of layers check alike: weights, values of channels, residuals, packed weights, activations.
#pragma once

#include <initializer_list>
#include <optional>

#include "core/activation.h"
#include "core/binding.h"

namespace pvk {

using OptionalTensor = std::optional<Tensor>;

template <typename TensorOrView>
void check_size(const char* op, const char* argument, const TensorOrView& tensor,
                std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == int64_t(sizes.size());
  for (int64_t i = 0; i < tensor.dim() && fits; ++i) fits = tensor.size(i) == sizes.begin()[i];
  if (fits) return;
  std::ostringstream text;
  for (const int64_t& size : sizes) text << (&size == sizes.begin() ? "" : ", ") << size;
  fail(op, ": expected ", argument, " to have size [", text.str(), "], but got ", shape_of(tensor));
}

// Of the dtype and on the device of input.
template <typename TensorOrView>
void check_as_input(const char* op, const char* argument, const TensorOrView& tensor, const View& input,
                    const char* name = "input") {
  PVK_CHECK(tensor.scalar_type() == input.scalar_type(), op, ": expected ", argument, " to be ", input.scalar_type(),
            " as ", name, " is, but got ", tensor.scalar_type());
  check_same_device(op, argument, tensor, name, input);
}

// Of one value a channel; makes them contiguous.
inline DType check_channels(const char* op, const char* argument, OptionalTensor& values, const View& input,
                            int64_t channels) {
  if (!values) return DType::kFloat32;
  check_size(op, argument, *values, {channels});
  PVK_CHECK(values->scalar_type() == input.scalar_type() ||
                (values->scalar_type() == ScalarType::Float && input.scalar_type() != ScalarType::Double),
            op, ": expected ", argument, " to be ", input.scalar_type(),
            " as input is, or float32 beside a 16-bit input, but got ", values->scalar_type());
  check_same_device(op, argument, *values, "input", input);
  if (!values->is_contiguous()) values = torch::stable::contiguous(*values);
  return dtype_of(op, argument, *values);
}

inline Activation activation_of(const char* op, int64_t number) {
  PVK_CHECK(number >= 0 && number <= int64_t(Activation::kSigmoid), op, ": expected activation to be 0 to 6, but got ",
            number);
  return Activation(number);
}

// What pack() wrote for `what`: `bytes` of it, and null where that is 0.
inline const void* packed_data(const char* op, const Tensor& packed, const View& input, int64_t bytes,
                               const char* what) {
  check_same_device(op, "packed", packed, "input", input);
  PVK_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == bytes, op,
            ": expected packed to be ", bytes, " bytes of ", what, ", but got ", shape_of(packed));
  return bytes > 0 ? data_of(packed) : nullptr;
}

// What the kernels of an op on CUDA want beside its tensors; kept by the caller until they are queued.
template <typename Params>
Tensor workspace_of(Params& p, const Tensor& like) {
  const Tensor workspace = empty({workspace_bytes(p)}, ScalarType::Byte, like);
  p.workspace = workspace.numel() > 0 ? data_of(workspace) : nullptr;
  return workspace;
}

inline const void* data_of(const OptionalTensor& tensor) {
  return tensor ? data_of(*tensor) : nullptr;
}

}  // namespace pvk
