// What the two depthwise kernels share: the packed weight, and where the taps of an output read.
#pragma once

#include "core/buffer.h"
#include "core/epilogue.h"
#include "core/math.h"
#include "core/simd.h"
#include "ops/conv2d/cpu_kernels.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Output channel k = c * M + m reads input channel c. The packed weight is [M][R * S][pitch], of the type computed in,
// with zeros from C to the pitch.

// Any layouts; meant for fewer channels than a register has lanes.
template <typename scalar_t>
void depthwise_planes(const Conv2dParams& p, const opmath_t<scalar_t>* weight, int64_t pitch);

// The rows (or columns) of the input that taps read: entry i is that of place i - padding, -1 for zeros. `spare`
// entries of -1 follow those that outputs need.
class TapTable {
 public:
  TapTable(const Conv2dParams& p, int axis, int64_t spare) {
    const int64_t size = axis == 0 ? p.H : p.W, outputs = axis == 0 ? p.OH : p.OW, taps = axis == 0 ? p.R : p.S;
    const int64_t padding = axis == 0 ? p.padding_top : p.padding_left;
    needed_ = (outputs - 1) * p.stride[axis] + (taps - 1) * p.dilation[axis] + 1;
    count_ = needed_ + spare;
    entries_.reserve(count_);
    for (int64_t i = 0; i < count_; ++i)
      entries_[i] = i < needed_ ? source_index(p.padding_mode, i - padding, size) : -1;
  }
  int64_t operator[](int64_t i) const { return entries_[i]; }
  int64_t needed() const { return needed_; }
  int64_t count() const { return count_; }

 private:
  Buffer<int64_t> entries_;
  int64_t needed_, count_;
};

// The same times a stride: offsets.
class TapOffsets {
 public:
  TapOffsets(const TapTable& table, int64_t stride) : offsets_(table.count()) {
    for (int64_t i = 0; i < table.count(); ++i) offsets_[i] = table[i] < 0 ? -1 : table[i] * stride;
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
