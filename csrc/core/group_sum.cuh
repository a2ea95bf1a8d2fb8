// Sums over the threads that own a row together: a warp, or a block. In one order; every thread gets the result.
#pragma once

#include "core/warp.cuh"

namespace pvk {

constexpr int kMostWarps = 32;

// N sums at a time. The whole block calls it where Threads > 32, the whole warp where it is 32. Static: the emulator's
// shared memory names its source, which instrumented files do not share.
template <int Threads, int N, typename T>
static PVK_DEVICE void sum_of_group(T (&value)[N]) {
  static_assert(Threads % kWarpSize == 0 && Threads <= kMostWarps * kWarpSize);
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value[i] += shfl_xor(value[i], mask);
  }
  if constexpr (Threads > kWarpSize) {
    constexpr int kWarps = Threads / kWarpSize;
    SIMT_SHARED(T[N * kWarps], sums);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i * kWarps + warp] = value[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value[i] = sums[i * kWarps];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) value[i] += sums[i * kWarps + w];
    }
    __syncthreads();  // before they are written again
  }
}

PVK_DEVICE float rsqrt_of(float x) {
  return 1.0f / sqrtf(x);
}
PVK_DEVICE double rsqrt_of(double x) {
  return 1.0 / sqrt(x);
}

// VEC neighbours of a vector whose dtype only the run knows; `otherwise` where there is none.
template <int VEC, typename T>
PVK_DEVICE void load_weights(const void* data, DType dtype, int64_t begin, T otherwise, T (&out)[VEC]) {
  if (data != nullptr) return load_strided(data, dtype, begin, 1, out);
#pragma unroll
  for (int e = 0; e < VEC; ++e) out[e] = otherwise;
}

}  // namespace pvk
