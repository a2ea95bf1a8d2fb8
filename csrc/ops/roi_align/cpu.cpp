// RoI align on the CPU, forward and backward: SIMD along channels.
//
// Sampling is separable: a bin is a sum over a few map rows times a few map columns, so each RoI gets one short list
// of (pixel, weight) taps per bin and axis, with samples that share a pixel merged, and all its channels use them.
// Results do not depend on the number of threads: an element of the output, or of the map's gradient, is summed by
// one thread in one order (backward: RoIs ascending).
#include "core/dispatch.h"
#include "core/isa.h"
#include "ops/roi_align/cpu_backward.h"
#include "ops/roi_align/cpu_forward.h"
#include "ops/roi_align/roi_align.h"

namespace pvk::roi_align {
namespace PVK_ISA {

void forward(const RoiAlignParams& p) {
  if (p.K * p.C * p.PH * p.PW == 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (p.boxes_dtype == p.dtype) {
      forward_typed<scalar_t, scalar_t>(p);
    } else {
      forward_typed<scalar_t, float>(p);
    }
  });
}

void backward(const RoiAlignParams& p) {
  int64_t pixels = 0;
  for (int l = 0; l < p.num_levels; ++l) pixels += p.levels[l].H * p.levels[l].W;
  if (p.N * p.C * pixels == 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (p.boxes_dtype == p.dtype) {
      backward_typed<scalar_t, scalar_t>(p);
    } else {
      backward_typed<scalar_t, float>(p);
    }
  });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, RoiAlignParams)
PVK_CPU_ENTRY(void, backward, RoiAlignParams)

}  // namespace pvk::roi_align
