// What the two depthwise kernels share: the packed weight, and where the taps of an output read.
#pragma once

#include "core/buffer.h"
#include "core/epilogue.h"
#include "core/math.h"
#include "core/simd.h"
#include "ops/conv2d/cpu_kernels.h"
#include "ops/conv2d/cpu_pool.h"
#include "ops/conv2d/cpu_tap_table.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

// Output channel k = c * M + m reads input channel c. The packed weight is [M][R * S][pitch], of the type computed in,
// with zeros from C to the pitch.

// Any layouts; meant for fewer channels than a register has lanes.
template <typename scalar_t>
void depthwise_planes(const Conv2dParams& p, const opmath_t<scalar_t>* weight, int64_t pitch);

// A TapTable times a stride: offsets.
class TapOffsets {
 public:
  TapOffsets(const TapTable& table, int64_t stride) : offsets_(table.count()) {
    for (int64_t i = 0; i < table.count(); ++i) offsets_[i] = table[i] < 0 ? -1 : table[i] * stride;
  }
  const int64_t* data() const { return &offsets_[0]; }

 private:
  Buffer<int64_t> offsets_;
};

}  // namespace pvk::conv2d::PVK_ISA
