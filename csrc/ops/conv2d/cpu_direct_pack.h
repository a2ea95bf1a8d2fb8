// The direct convolution's weights: for each group, each panel of outputs, [tap][channel][width], in the computing
// type.
//
// Before them one word: whether all are finite. Where they are not, a padded zero times an infinite weight must not
// become NaN, so the kernel leaves padded taps out.
#pragma once

#include <cstdint>

#include "core/gemm_panels.h"
#include "core/parallel.h"
#include "ops/conv2d/conv2d.h"
#include "ops/conv2d/cpu_direct_groups.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

inline constexpr int64_t kPackedHeader = 64;  // bytes; keeps the panels aligned

// How the weights are cut. Where groups are few channels wide, a "group" here is a register of them.
template <typename T>
struct DirectWeights {
  bool shuffled;
  int64_t taps, groups;
  int64_t channels, outputs;  // of a group
  int64_t depth_of_tap;       // steps of a tap: channels, or those of one of the groups in a register
  Panels<T> panels;

  explicit DirectWeights(const Conv2dParams& p)
      : shuffled(shuffles_groups<T>(p.C / p.groups, p.K / p.groups, p.groups)),
        taps(p.R * p.S),
        groups(shuffled ? p.C / kLanes<T> : p.groups),
        channels(p.C / groups),
        outputs(p.K / groups),
        depth_of_tap(p.C / p.groups),
        panels(outputs) {}

  int64_t depth() const { return taps * depth_of_tap; }
  int64_t group_elements() const { return depth() * panels.padded(); }
  int64_t offset_of(int64_t group, int64_t panel) const {
    return group * group_elements() + panels.first_output(panel) * depth();
  }
};

template <typename scalar_t>
int64_t packed_bytes_typed(const Conv2dParams& p) {
  using T = opmath_t<scalar_t>;
  const DirectWeights<T> w(p);
  return kPackedHeader + w.groups * w.group_elements() * int64_t(sizeof(T));
}

template <typename scalar_t>
void pack_typed(const Conv2dParams& p, void* packed) {
  using T = opmath_t<scalar_t>;
  const DirectWeights<T> w(p);
  const scalar_t* const weight = static_cast<const scalar_t*>(p.weight);
  T* const target = reinterpret_cast<T*>(static_cast<char*>(packed) + kPackedHeader);
  int64_t bad = 0;
  parallel_for(w.groups * w.panels.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / w.panels.count, panel = i % w.panels.count;
      const int width = w.panels.vectors_of(panel) * kLanes<T>;
      T* const to = target + w.offset_of(group, panel);
      pack_panel<T, scalar_t>(to, width,
                              weight + (group * w.outputs + w.panels.first_output(panel)) * p.weight_stride[0],
                              w.panels.outputs_of(panel), p.weight_stride[0], w.depth_of_tap, p.weight_stride[1],
                              {p.R, p.S}, {p.weight_stride[2], p.weight_stride[3]});
      Vec<T> sum{};
      for (int64_t e = 0; e < w.depth() * width; e += kLanes<T>) sum = fma(load(to + e), Vec<T>{}, sum);
      if (any<T>(sum != Vec<T>{})) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
    }
  });
  *static_cast<int64_t*>(packed) = bad == 0;
}

}  // namespace pvk::conv2d::PVK_ISA
