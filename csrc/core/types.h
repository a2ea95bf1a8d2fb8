// Plain types that every backend shares. No torch header: kernels include this.
#pragma once

#include <cstdint>

namespace pvk {

// Element types of the kernels; the values are the library's own.
enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Raw 16-bit storage for the host. CUDA files map the same tags to __half and __nv_bfloat16.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// A cudaStream_t, or nullptr on the CPU.
using Stream = void*;

}  // namespace pvk
