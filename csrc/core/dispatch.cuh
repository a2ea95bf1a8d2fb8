// From a DType to the scalar type of a kernel: dispatch_dtype(dtype, [&]<typename scalar_t>() { ... }).
#pragma once

#include <stdexcept>
#include <string>

#include "core/types.h"
#include "core/warp.cuh"

namespace pvk {

template <typename F>
void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kFloat64:
      return f.template operator()<double>();
    case DType::kFloat16:
      return f.template operator()<__half>();
    case DType::kBFloat16:
      return f.template operator()<__nv_bfloat16>();
  }
  throw std::runtime_error("CUDA: expected a floating-point dtype, but got tag " + std::to_string(int(dtype)));
}

}  // namespace pvk
