// Which rows and columns of the input the taps of a convolution read, padding modes included.
#pragma once

#include "core/buffer.h"
#include "ops/conv2d/conv2d.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

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

}  // namespace pvk::conv2d::PVK_ISA
