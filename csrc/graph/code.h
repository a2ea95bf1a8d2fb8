// Reading of what pyvision_kernels/convert/program.py writes: numbers in order, and constants by their index.
#pragma once

#include <vector>

#include "core/layer_binding.h"

namespace pvk::graph {

inline constexpr const char* kOp = "_graph";

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;

class Code {
 public:
  explicit Code(const Numbers& numbers) : at_(numbers.data()), end_(at_ + numbers.size()) {}
  explicit Code(const Tensor& code) {
    PVK_CHECK(code.dim() == 1 && code.scalar_type() == ScalarType::Long && code.is_contiguous() && code.is_cpu(), kOp,
              ": expected code to be int64 of one dimension, on the CPU, but got ", shape_of(code), " of ",
              code.scalar_type());
    at_ = static_cast<const int64_t*>(code.data_ptr());
    end_ = at_ + code.numel();
  }

  bool is_done() const { return at_ == end_; }
  int64_t next() { return *next(1); }
  const int64_t* next(size_t count) {
    PVK_CHECK(count <= size_t(end_ - at_), kOp, ": expected more numbers than there are");
    at_ += count;
    return at_ - count;
  }

  // Whether the next operand is none, -1; then it is passed over.
  bool is_absent() {
    if (*next(1) == -1) return true;
    --at_;
    return false;
  }

  const Tensor& constant(const Tensors& constants) {
    const int64_t index = next();
    PVK_CHECK(index >= 0 && index < int64_t(constants.size()), kOp, ": expected an index below ", constants.size(),
              " of a constant, but got ", index);
    return constants[size_t(index)];
  }
  OptionalTensor optional_constant(const Tensors& constants) {
    if (is_absent()) return std::nullopt;
    return constant(constants);
  }

 private:
  const int64_t* at_ = nullptr;
  const int64_t* end_ = nullptr;
};

}  // namespace pvk::graph
