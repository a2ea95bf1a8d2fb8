// What the two depthwise kernels share: the packed weight, and where the taps of an output read.
#pragma once

#include "core/buffer.h"
#include "core/epilogue.h"
#include "core/math.h"
#include "core/simd.h"
#include "ops/conv2d/cpu_kernels.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Output channel k = c * M + m reads input channel c. The packed weight is [M][R * S][C], of the type computed in.

// Input and output of stride 1 along C, and C >= kLanes.
template <typename scalar_t>
void depthwise_channels_last(const Conv2dParams& p, const opmath_t<scalar_t>* weight);

// Input of stride 1 along W, output of any strides.
template <typename scalar_t>
void depthwise_planes(const Conv2dParams& p, const opmath_t<scalar_t>* weight);

// The rows (or columns) that taps read: entry i is source_index(i - padding) * stride, -1 for zeros, and -1 for the
// `spare` entries after those that outputs need.
class TapOffsets {
 public:
  TapOffsets(const Conv2dParams& p, int axis, int64_t spare) {
    const int64_t size = axis == 0 ? p.H : p.W, outputs = axis == 0 ? p.OH : p.OW, taps = axis == 0 ? p.R : p.S;
    const int64_t padding = axis == 0 ? p.padding_top : p.padding_left;
    const int64_t needed = (outputs - 1) * p.stride[axis] + (taps - 1) * p.dilation[axis] + 1;
    offsets_.reserve(needed + spare);
    for (int64_t i = 0; i < needed + spare; ++i) {
      const int64_t source = i < needed ? source_index(p.padding_mode, i - padding, size) : -1;
      offsets_[i] = source < 0 ? -1 : source * p.input_stride[2 + axis];
    }
  }
  const int64_t* data() const { return &offsets_[0]; }

 private:
  Buffer<int64_t> offsets_;
};

// Activations that are a few operations on a register: clamping, and hardswish. The others go through finish_rows().
template <typename T>
struct CheapActivation {
  bool is_cheap, is_hardswish;
  T low, high;

  explicit CheapActivation(Activation activation)
      : is_cheap(activation == Activation::kNone || activation == Activation::kRelu ||
                 activation == Activation::kRelu6 || activation == Activation::kHardswish),
        is_hardswish(activation == Activation::kHardswish),
        low(activation == Activation::kNone ? T(-__builtin_inf()) : T(0)),
        high(activation == Activation::kRelu6 ? T(6) : T(__builtin_inf())) {}

  PVK_INLINE Vec<T> clamp(Vec<T> x) const {  // NaN stays
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
  }
};

// The larger one; NaN if either is.
template <typename T>
PVK_INLINE Vec<T> pool_max(Vec<T> a, Vec<T> b) {
  return a > b || a != a ? a : b;
}

}  // namespace pvk::conv2d::PVK_ISA
