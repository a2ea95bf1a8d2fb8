// conv2d on the CPU, directly: plain loops, to be replaced.
#include <cmath>

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/conv2d/cpu_kernels.h"

namespace pvk::conv2d::PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

template <typename T>
T activate(Activation activation, T x) {
  switch (activation) {
    case Activation::kRelu:
      return x < 0 ? T(0) : x;
    case Activation::kRelu6:
      return x < 0 ? T(0) : x > 6 ? T(6) : x;
    case Activation::kHardswish:
      return x * (x < -3 ? T(0) : x > 3 ? T(1) : (x + 3) / 6);
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return T(0.5) * x * (1 + std::erf(x * T(0.70710678118654752440)));
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::kNone:
      break;
  }
  return x;
}

template <typename T>
T channel(const void* values, DType dtype, int64_t k) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(values)[k];
    case DType::kFloat64:
      return T(static_cast<const double*>(values)[k]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(values)[k]);
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(values)[k]);
  }
  return 0;
}

template <typename scalar_t>
opmath_t<scalar_t> value_at(const Conv2dParams& p, int64_t n, int64_t k, int64_t oh, int64_t ow) {
  using T = opmath_t<scalar_t>;
  const int64_t channels = p.C / p.groups, first = k / (p.K / p.groups) * channels;
  T sum = 0;
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t h = source_index(p.padding_mode, oh * p.stride[0] - p.padding_top + r * p.dilation[0], p.H);
    if (h < 0) continue;
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t w = source_index(p.padding_mode, ow * p.stride[1] - p.padding_left + s * p.dilation[1], p.W);
      if (w < 0) continue;
      const scalar_t* x = static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] + first * p.input_stride[1] +
                          h * p.input_stride[2] + w * p.input_stride[3];
      const scalar_t* f = static_cast<const scalar_t*>(p.weight) + k * p.weight_stride[0] + r * p.weight_stride[2] +
                          s * p.weight_stride[3];
      for (int64_t c = 0; c < channels; ++c)
        sum += T(to_float(x[c * p.input_stride[1]])) * T(to_float(f[c * p.weight_stride[1]]));
    }
  }
  if (p.bias) sum += channel<T>(p.bias, p.bias_dtype, k);
  if (p.scale) sum *= channel<T>(p.scale, p.scale_dtype, k);
  if (p.shift) sum += channel<T>(p.shift, p.scale_dtype, k);
  if (p.residual)
    sum += T(to_float(static_cast<const scalar_t*>(p.residual)[n * p.residual_stride[0] + k * p.residual_stride[1] +
                                                               oh * p.residual_stride[2] + ow * p.residual_stride[3]]));
  return activate(p.activation, sum);
}

}  // namespace

void forward_direct(const Conv2dParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using T = opmath_t<scalar_t>;
    const int64_t PH = p.pool ? p.OH / 2 : p.OH, PW = p.pool ? p.OW / 2 : p.OW;
    parallel_for(p.N * PH, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / PH, h = row % PH;
        for (int64_t w = 0; w < PW; ++w) {
          for (int64_t k = 0; k < p.K; ++k) {
            T best = value_at<scalar_t>(p, n, k, p.pool ? 2 * h : h, p.pool ? 2 * w : w);
            for (int i = 1; i < (p.pool ? 4 : 1); ++i) {
              const T value = value_at<scalar_t>(p, n, k, 2 * h + i / 2, 2 * w + i % 2);
              if (value > best || value != value) best = value;
            }
            static_cast<scalar_t*>(p.output)[n * p.output_stride[0] + k * p.output_stride[1] + h * p.output_stride[2] +
                                             w * p.output_stride[3]] = from_float<scalar_t>(best);
          }
        }
      }
    });
  });
}

int64_t packed_bytes_direct(const Conv2dParams&) {
  return 0;
}

void pack_direct(const PackParams&) {}

}  // namespace pvk::conv2d::PVK_ISA
