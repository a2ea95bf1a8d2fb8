// Stands in for CUDA's header of this name: g++ compiles a .cu file with it, and the kernels run on the CPU.
#pragma once

#if !defined(PVK_SIMT)
#error "the emulator's cuda_runtime.h in a build without PVK_SIMT"
#endif

#include <cstddef>

#if defined(SIMT_HOOKS)
// The compiler's own calls of these, for copies of large or unknown size, are accesses of the kernel too.
extern "C" void* memcpy(void*, const void*, size_t) noexcept __asm__("simt_memcpy");
extern "C" void* memmove(void*, const void*, size_t) noexcept __asm__("simt_memmove");
extern "C" void* memset(void*, int, size_t) noexcept __asm__("simt_memset");
#endif

// What nvcc includes unasked. <memory> uses the attribute __noinline__, and <math.h> declares names like __expf: both
// have to come before what is defined here.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>

#include "simt/simt.h"
#include "simt/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __constant__ const
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static_assert(false, "a raw __shared__ variable: write SIMT_SHARED or SIMT_DYN_SHARED");

// Macros of a call, so that cudaLaunchConfig_t can have members that look like the built-in variables.
#define threadIdx simt_thread_idx()
#define blockIdx simt_block_idx()
#define blockDim simt_block_dim()
#define gridDim simt_grid_dim()

__forceinline__ uint3 simt_thread_idx() {
  return simt::thread_idx();
}
__forceinline__ uint3 simt_block_idx() {
  return simt::block_idx();
}
__forceinline__ dim3 simt_block_dim() {
  return simt::block_dim();
}
__forceinline__ dim3 simt_grid_dim() {
  return simt::grid_dim();
}
inline constexpr int warpSize = simt::kWarpSize;

#include "simt/atomics.h"
#include "simt/intrinsics.h"
#include "simt/runtime_api.h"
#include "simt/warp.h"
