// From a DType to a type: calls body(scalar_t{}) with the element type of the host.
#pragma once

#include "core/types.h"

namespace pvk::PVK_ISA {

template <typename Body>
inline void dispatch_floating(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kBFloat16:
      return body(BFloat16{});
  }
}

}  // namespace pvk::PVK_ISA
