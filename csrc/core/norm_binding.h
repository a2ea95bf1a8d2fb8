// What the bindings of normalisations share: checks of maps and vectors, allocation; and, of maps [N, C, ...] with a
// residual and an activation, all of a backward but its statistics and scratch.
#pragma once

#include <optional>
#include <tuple>

#include "core/activation.h"
#include "core/binding.h"

namespace pvk {

using OptionalTensor = std::optional<Tensor>;

inline ScalarType stats_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Strides of dimensions of one say nothing.
inline bool is_channels_last(const Tensor& map) {
  if (map.dim() != 4) return false;
  int64_t stride = 1;
  for (const int64_t i : {1, 3, 2, 0}) {
    if (map.size(i) != 1 && map.stride(i) != stride) return false;
    stride *= map.size(i);
  }
  return true;
}

// Of the size, dtype and device of the input; contiguous, or channels_last where `rows`.
inline void check_map(const char* op, const char* argument, const Tensor& map, const Tensor& input, bool rows = false) {
  bool same = map.dim() == input.dim();
  for (int64_t i = 0; same && i < map.dim(); ++i) same = map.size(i) == input.size(i);
  PVK_CHECK(same, op, ": expected ", argument, " to have size ", shape_of(input), ", but got ", shape_of(map));
  PVK_CHECK(rows ? is_channels_last(map) : map.is_contiguous(), op, ": expected ", argument, " to be ",
            rows ? "channels_last" : "contiguous", ", but got size ", shape_of(map));
  PVK_CHECK(map.scalar_type() == input.scalar_type(), op, ": expected ", argument, " to be ", input.scalar_type(),
            " as input is, but got ", map.scalar_type());
  check_same_device(op, argument, map, "input", input);
}

// The address of `size` elements of `dtype`, of input's or float32 beside 16 bits; null where there is none.
inline const void* vector_of(const char* op, const char* argument, const OptionalTensor& vector, const Tensor& input,
                             int64_t size, DType& dtype) {
  if (!vector) return nullptr;
  PVK_CHECK(vector->numel() == size && vector->is_contiguous(), op, ": expected ", argument, " to have ", size,
            " elements and to be contiguous, but got size ", shape_of(*vector));
  PVK_CHECK(vector->scalar_type() == input.scalar_type() ||
                (vector->scalar_type() == ScalarType::Float && input.scalar_type() != ScalarType::Double),
            op, ": expected ", argument, " to be ", input.scalar_type(),
            " as input is, or float32 beside a 16-bit input, but got ", vector->scalar_type());
  check_same_device(op, argument, *vector, "input", input);
  dtype = dtype_of(op, argument, *vector);
  return data_of(*vector);
}

inline void check_pair(const char* op, const char* second, const OptionalTensor& one, const OptionalTensor& other) {
  PVK_CHECK(!one || !other || one->scalar_type() == other->scalar_type(), op, ": expected ", second,
            " to have the dtype of the other vector, but got ", other->scalar_type());
}

inline Tensor new_like(const Tensor& tensor) {
  const Tensor result = torch::stable::empty_like(tensor);
#if !defined(PVK_CUDA)
  advise_huge_pages(result.data_ptr(), result.numel() * int64_t(result.element_size()));
#endif
  return result;
}

// Sizes of a map [N, C, ...]; returns whether it is channels_last, else it is contiguous.
template <typename Params>
bool fill_map(Params& p, const char* op, const Tensor& input) {
  PVK_CHECK(input.dim() >= 2 && input.numel() > 0, op,
            ": expected input to have at least 2 dimensions [N, C, ...] and not to be empty, but got ",
            shape_of(input));
  const bool channels_last = !input.is_contiguous() && is_channels_last(input);
  PVK_CHECK(channels_last || input.is_contiguous(), op,
            ": expected input to be contiguous or channels_last, but got size ", shape_of(input));
  p.dtype = p.weight_dtype = dtype_of(op, "input", input);
  p.N = input.size(0);
  p.C = input.size(1);
  p.S = 1;
  for (int64_t i = 2; i < input.dim(); ++i) p.S *= input.size(i);
  return channels_last;
}

// What the forward is given beside the map.
template <typename Params>
void fill_forward(Params& p, const char* op, const Tensor& input, bool channels_last, const OptionalTensor& residual,
                  const OptionalTensor& weight, const OptionalTensor& bias, int64_t activation) {
  if (residual) check_map(op, "residual", *residual, input, channels_last);
  PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kSigmoid), op,
            ": expected activation to be 0 to 6, but got ", activation);
  check_pair(op, "bias", weight, bias);
  p.input = data_of(input);
  p.residual = residual ? data_of(*residual) : nullptr;
  p.weight = vector_of(op, "weight", weight, input, p.C, p.weight_dtype);
  p.bias = vector_of(op, "bias", bias, input, p.C, p.weight_dtype);
  p.activation = Activation(activation);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of input, residual, weight, bias; or empty

struct Needs {
  bool input, residual, weight, bias;
};

// What the backward is given beside the map and the statistics' size, and the gradients that it is to make.
template <typename Params>
Gradients fill_backward(Params& p, const char* op, const Tensor& grad, const Tensor& input, bool channels_last,
                        const OptionalTensor& output, const Tensor& stats, const OptionalTensor& weight,
                        const OptionalTensor& bias, int64_t activation, const Needs& needs) {
  check_map(op, "grad", grad, input, channels_last);
  if (output) check_map(op, "output", *output, input, channels_last);
  PVK_CHECK(activation >= 0 && activation <= int64_t(Activation::kRelu6), op,
            ": expected activation to be 0 to 2, but got ", activation);
  PVK_CHECK(activation == 0 || output, op, ": expected output to be a Tensor beside an activation");
  check_same_device(op, "stats", stats, "input", input);
  PVK_CHECK(weight || !needs.weight, op, ": expected weight to be a Tensor where its gradient is asked for");
  PVK_CHECK(bias || !needs.bias, op, ": expected bias to be a Tensor where its gradient is asked for");
  check_pair(op, "bias", weight, bias);
  p.grad = data_of(grad);
  p.input = data_of(input);
  p.output = activation != 0 ? data_of(*output) : nullptr;
  p.stats = data_of(stats);
  p.weight = vector_of(op, "weight", weight, input, p.C, p.weight_dtype);
  vector_of(op, "bias", bias, input, p.C, p.weight_dtype);
  p.activation = Activation(activation);
  const auto made = [&](bool needed, const OptionalTensor& like, void*& address) {
    const Tensor gradient = needed ? new_like(*like) : empty({0}, input.scalar_type(), input);
    address = needed ? data_of(gradient) : nullptr;
    return gradient;
  };
  return {made(needs.input, input, p.grad_input), made(needs.residual, input, p.grad_residual),
          made(needs.weight, weight, p.grad_weight), made(needs.bias, bias, p.grad_bias)};
}

}  // namespace pvk
