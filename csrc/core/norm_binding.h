// What the bindings of normalisations share: checks of maps and vectors, allocation.
#pragma once

#include <optional>

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

}  // namespace pvk
