// linear on CUDA: a few rows by a kernel that reads the weight once, more as the 1 x 1 convolution
// of one image, whose pixels are the rows.
#include "core/activation.cuh"
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/linear/as_convolution.h"

namespace pvk::linear {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / kWarpSize;
constexpr int64_t kFewRows = 16;  // at most: the weight's bytes are what it costs then
constexpr int kRows = 8;          // at once, in registers

// A warp owns a feature k of the output for kRows rows: its lanes take VEC neighbouring features of the input each, so
// that a row of the weight is read once, by 16 bytes where VEC is more than one; the lanes' sums are added as a tree.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads) linear_rows_kernel(const LinearParams p) {
  using T = opmath_t<scalar_t>;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t k = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (k >= p.K) return;
  const scalar_t* const weight = static_cast<const scalar_t*>(p.weight) + k * p.weight_stride[0];
  for (int64_t m = 0; m < p.M; m += kRows) {
    const scalar_t* const input = static_cast<const scalar_t*>(p.input) + m * p.input_stride[0];
    const int rows = int(min_of(p.M - m, int64_t(kRows)));
    T sums[kRows] = {};
    for (int64_t c = lane * VEC; c < p.C; c += kWarpSize * VEC) {
      const auto f = load_vec<VEC>(weight + c * p.weight_stride[1]);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows) break;
        const auto x = load_vec<VEC>(input + row * p.input_stride[0] + c * p.input_stride[1]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) sums[row] = fma(to_opmath(x.data[e]), to_opmath(f.data[e]), sums[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows) break;
      T sum = sums[row];
      for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
      if (lane != 0) continue;
      if (p.bias != nullptr) {
        sum += p.bias_dtype == p.dtype ? to_opmath(static_cast<const scalar_t*>(p.bias)[k])
                                       : T(static_cast<const float*>(p.bias)[k]);
      }
      if (p.residual != nullptr) {
        const int64_t at = (m + row) * p.residual_stride[0] + k * p.residual_stride[1];
        sum += to_opmath(static_cast<const scalar_t*>(p.residual)[at]);
      }
      static_cast<scalar_t*>(p.output)[(m + row) * p.K + k] = from_opmath<scalar_t>(activate(p.activation, sum));
    }
  }
}

bool has_vectors(const void* data, const int64_t* stride, int64_t rows, int64_t vec) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[1] == 1 && (rows == 1 || stride[0] % vec == 0);
}

conv2d::Conv2dParams product_of(const LinearParams& p) {
  auto conv = as_convolution<conv2d::Conv2dParams>(p);
  conv.algorithm = p.tf32 ? conv2d::Algorithm::kTf32 : conv2d::Algorithm::kDirect;
  conv.workspace = p.workspace;
  return conv;
}

}  // namespace

void forward(const LinearParams& p, Stream stream) {
  if (p.M > kFewRows) return conv2d::forward(product_of(p), stream);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kVec = kVec16<scalar_t>;
    const LaunchConfig config = {dim3(grid_of("linear", ceil_div(p.K, int64_t(kWarps)))), dim3(kBlockThreads), 0,
                                 stream};
    if (p.C % kVec == 0 && has_vectors(p.weight, p.weight_stride, p.K, kVec) &&
        has_vectors(p.input, p.input_stride, p.M, kVec)) {
      launch(linear_rows_kernel<scalar_t, kVec>, config, p);
    } else {
      launch(linear_rows_kernel<scalar_t, 1>, config, p);
    }
  });
}

int64_t packed_bytes(const LinearParams& p, Stream stream) {
  return conv2d::packed_bytes(product_of(p), stream);
}

void pack(const PackParams& p, Stream stream) {
  auto conv = as_convolution<conv2d::PackParams>(p);
  conv.target = p.target;
  conv2d::pack(conv, stream);
}

int64_t workspace_bytes(const LinearParams& p) {
  return p.M > kFewRows ? conv2d::workspace_bytes(product_of(p)) : 0;
}

}  // namespace pvk::linear
