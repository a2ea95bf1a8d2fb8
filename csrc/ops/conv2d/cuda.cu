// conv2d on CUDA: one thread an output element, any convolution. Correct and plain; it reuses nothing but the caches.
#include "core/activation.cuh"
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/warp.cuh"
#include "ops/conv2d/cuda_kernels.h"

namespace pvk::conv2d {
namespace {

constexpr int kBlockThreads = 256;

template <typename T>
PVK_DEVICE T channel_value(const void* values, DType dtype, int64_t k) {
  switch (dtype) {
    case DType::kFloat32:
      return T(static_cast<const float*>(values)[k]);
    case DType::kFloat64:
      return T(static_cast<const double*>(values)[k]);
    case DType::kFloat16:
      return T(to_opmath(static_cast<const __half*>(values)[k]));
    case DType::kBFloat16:
      return T(to_opmath(static_cast<const __nv_bfloat16*>(values)[k]));
  }
  return T(0);
}

// One element of the result before pooling.
template <typename scalar_t>
PVK_DEVICE opmath_t<scalar_t> value_at(const Conv2dParams& p, int64_t n, int64_t k, int64_t oh, int64_t ow) {
  using T = opmath_t<scalar_t>;
  const int64_t channels = p.C / p.groups, first = k / (p.K / p.groups) * channels;
  T sum = T(0);
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t h = source_index(p.padding_mode, oh * p.stride[0] - p.padding_top + r * p.dilation[0], p.H);
    for (int64_t s = 0; s < p.S && h >= 0; ++s) {
      const int64_t w = source_index(p.padding_mode, ow * p.stride[1] - p.padding_left + s * p.dilation[1], p.W);
      if (w < 0) continue;
      const scalar_t* x = static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] + first * p.input_stride[1] +
                          h * p.input_stride[2] + w * p.input_stride[3];
      const scalar_t* f = static_cast<const scalar_t*>(p.weight) + k * p.weight_stride[0] + r * p.weight_stride[2] +
                          s * p.weight_stride[3];
      for (int64_t c = 0; c < channels; ++c)
        sum = fma(to_opmath(x[c * p.input_stride[1]]), to_opmath(f[c * p.weight_stride[1]]), sum);
    }
  }
  if (p.bias != nullptr) sum += channel_value<T>(p.bias, p.bias_dtype, k);
  if (p.scale != nullptr) sum *= channel_value<T>(p.scale, p.scale_dtype, k);
  if (p.shift != nullptr) sum += channel_value<T>(p.shift, p.scale_dtype, k);
  if (p.residual != nullptr) {
    const int64_t at =
        n * p.residual_stride[0] + k * p.residual_stride[1] + oh * p.residual_stride[2] + ow * p.residual_stride[3];
    sum += to_opmath(static_cast<const scalar_t*>(p.residual)[at]);
  }
  return activate(p.activation, sum);
}

// Thread i owns element i of the output, in the order of memory.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads) conv2d_kernel(const Conv2dParams p, bool channels_last) {
  using T = opmath_t<scalar_t>;
  const int64_t PH = p.rows_out(), PW = p.columns_out();
  const int64_t count = p.N * p.K * PH * PW;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t pixel = channels_last ? i / p.K : i % (PH * PW);
    const int64_t k = channels_last ? i % p.K : i / (PH * PW) % p.K;
    const int64_t n = i / (p.K * PH * PW), h = pixel / PW % PH, w = pixel % PW;
    T best = T(0);
#pragma unroll 1
    for (int j = 0; j < (p.pool ? 4 : 1); ++j) {
      const T value = value_at<scalar_t>(p, n, k, p.pool ? 2 * h + j / 2 : h, p.pool ? 2 * w + j % 2 : w);
      if (j == 0 || value > best || value != value) best = value;  // as max_pool2d: NaN wins
    }
    const int64_t at =
        n * p.output_stride[0] + k * p.output_stride[1] + h * p.output_stride[2] + w * p.output_stride[3];
    static_cast<scalar_t*>(p.output)[at] = from_opmath<scalar_t>(best);
  }
}

}  // namespace

void forward(const Conv2dParams& p, Stream stream) {
  if (is_depthwise(p)) return forward_depthwise(p, stream);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const int64_t count = p.N * p.K * p.rows_out() * p.columns_out();
    const int64_t blocks = min_of(ceil_div(count, int64_t(kBlockThreads)), int64_t(1) << 20);
    launch(conv2d_kernel<scalar_t>, {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream}, p,
           p.output_stride[1] == 1);
  });
}

int64_t packed_bytes(const Conv2dParams&, Stream) {
  return 0;
}

void pack(const PackParams&, Stream) {}

int64_t workspace_bytes(const Conv2dParams&) {
  return 0;
}

}  // namespace pvk::conv2d
