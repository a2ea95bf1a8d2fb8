// The direct convolution's weights: for each group, each panel of outputs, [tap][channel][width], in the computing
// type.
//
// Before them two words. First, whether all are finite: where they are not, a padded zero times an infinite weight must
// not become NaN, so the kernel leaves padded taps out. Then the layout, which another instruction set's differs from.
#pragma once

#include <cstdint>

#include "core/buffer.h"
#include "core/gemm_panels.h"
#include "core/parallel.h"
#include "ops/conv2d/conv2d.h"
#include "ops/conv2d/cpu_direct_groups.h"

namespace pvk::conv2d::PVK_ISA {

using namespace pvk::PVK_ISA;

inline constexpr int64_t kPackedHeader = 64;  // bytes; keeps the panels aligned

// How the weights are cut. Where groups are few channels wide, a "group" here is a register of them.
template <typename In>
struct DirectWeights {
  using T = opmath_t<In>;
  static constexpr bool kPairs = sizeof(In) != sizeof(T);
  bool shuffled;
  int64_t taps, groups;
  int64_t channels, outputs;  // of a group
  int64_t depth_of_tap;       // steps of a tap: channels, in whole pairs; or those of one of the groups in a register
  Panels<T> panels;

  explicit DirectWeights(const Conv2dParams& p)
      : shuffled(!kPairs && shuffles_groups<T>(p.C / p.groups, p.K / p.groups, p.groups)),
        taps(p.R * p.S),
        groups(shuffled ? p.C / kLanes<T> : p.groups),
        channels(p.C / groups),
        outputs(p.K / groups),
        depth_of_tap(kPairs ? (channels + 1) / 2 * 2 : p.C / p.groups),
        panels(outputs) {}

  int64_t depth() const { return taps * depth_of_tap; }
  int64_t group_elements() const { return depth() * panels.padded(); }
  int64_t offset_of(int64_t group, int64_t panel) const {
    return group * group_elements() + panels.first_output(panel) * depth();
  }
};

template <typename In>
inline constexpr int64_t kLayout = kRegisterBytes * 16 + int64_t(sizeof(In));

// Whether weights were packed for this instruction set and this type; a test may have changed it since.
template <typename In>
bool packed_here(const void* packed) {
  return static_cast<const int64_t*>(packed)[1] == kLayout<In>;
}

template <typename In>
int64_t packed_bytes_typed(const Conv2dParams& p) {
  const DirectWeights<In> w(p);
  return kPackedHeader + w.groups * w.group_elements() * int64_t(sizeof(In));
}

// source [tap][channels][width] to pairs; exact, since the values were bfloat16.
template <typename In>
void pack_pairs(In* target, const float* source, int64_t taps, int64_t channels, int64_t width) {
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; c += 2, target += 2 * width)
      for (int64_t lane = 0; lane < width; ++lane) {
        const float* const from = source + (tap * channels + c) * width + lane;
        target[2 * lane] = from_float<In>(from[0]);
        target[2 * lane + 1] = from_float<In>(c + 1 < channels ? from[width] : 0.0f);
      }
}

template <typename In, typename scalar_t>
void pack_typed(const Conv2dParams& p, void* packed) {
  using T = opmath_t<In>;
  const DirectWeights<In> w(p);
  const scalar_t* const weight = static_cast<const scalar_t*>(p.weight);
  In* const target = reinterpret_cast<In*>(static_cast<char*>(packed) + kPackedHeader);
  const int64_t channels = p.C / p.groups;
  int64_t bad = 0;
  parallel_for(w.groups * w.panels.count, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / w.panels.count, panel = i % w.panels.count;
      const int width = w.panels.vectors_of(panel) * kLanes<T>;
      In* const to = target + w.offset_of(group, panel);
      T* values;
      if constexpr (w.kPairs) {
        scratch.reserve(w.taps * channels * width);
        values = scratch.data();
      } else {
        values = to;
      }
      pack_panel<T, scalar_t>(values, width,
                              weight + (group * w.outputs + w.panels.first_output(panel)) * p.weight_stride[0],
                              w.panels.outputs_of(panel), p.weight_stride[0], channels, p.weight_stride[1], {p.R, p.S},
                              {p.weight_stride[2], p.weight_stride[3]});
      Vec<T> sum{};
      for (int64_t e = 0; e < w.taps * channels * width; e += kLanes<T>) sum = fma(load(values + e), Vec<T>{}, sum);
      if (any<T>(sum != Vec<T>{})) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
      if constexpr (w.kPairs) pack_pairs(to, values, w.taps, channels, width);
    }
  });
  static_cast<int64_t*>(packed)[0] = bad == 0;
  static_cast<int64_t*>(packed)[1] = kLayout<In>;
}

}  // namespace pvk::conv2d::PVK_ISA
