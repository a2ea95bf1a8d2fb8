// linear on CUDA: one warp an output element. Correct and plain; it reuses nothing but the caches.
#include "core/activation.cuh"
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/linear/linear.h"

namespace pvk::linear {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / kWarpSize;

// Lane l of warp i sums features l, l + 32, ... of output element i; the lanes' sums are added as a tree.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads) linear_kernel(const LinearParams p) {
  using T = opmath_t<scalar_t>;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  for (int64_t i = first; i < p.M * p.K; i += int64_t(gridDim.x) * kWarps) {
    const int64_t m = i / p.K, k = i % p.K;
    const scalar_t* x = static_cast<const scalar_t*>(p.input) + m * p.input_stride[0];
    const scalar_t* f = static_cast<const scalar_t*>(p.weight) + k * p.weight_stride[0];
    T sum = T(0);
    for (int64_t c = lane; c < p.C; c += kWarpSize)
      sum = fma(to_opmath(x[c * p.input_stride[1]]), to_opmath(f[c * p.weight_stride[1]]), sum);
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
    if (lane != 0) continue;
    if (p.bias != nullptr) {
      sum += p.bias_dtype == p.dtype ? to_opmath(static_cast<const scalar_t*>(p.bias)[k])
                                     : T(static_cast<const float*>(p.bias)[k]);
    }
    if (p.residual != nullptr)
      sum += to_opmath(static_cast<const scalar_t*>(p.residual)[m * p.residual_stride[0] + k * p.residual_stride[1]]);
    static_cast<scalar_t*>(p.output)[i] = from_opmath<scalar_t>(activate(p.activation, sum));
  }
}

}  // namespace

void forward(const LinearParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const int64_t blocks = min_of(ceil_div(p.M * p.K, int64_t(kWarps)), int64_t(1) << 20);
    launch(linear_kernel<scalar_t>, {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream}, p);
  });
}

int64_t packed_bytes(const LinearParams&, Stream) {
  return 0;
}

void pack(const PackParams&, Stream) {}

}  // namespace pvk::linear
