// How K outputs are cut into panels for core/gemm_tile.h, and the packing of a panel.
#pragma once

#include <cstdint>

#include "core/gemm_tile.h"
#include "core/math.h"
#include "core/simd.h"
#include "core/transpose.h"

namespace pvk::PVK_ISA {

// Panels of at most kTileVectors registers, as even as they come: 5 registers are 3 + 2.
template <typename T>
struct Panels {
  int64_t outputs, vectors, count;

  explicit Panels(int64_t outputs)
      : outputs(outputs),
        vectors(ceil_div<int64_t>(outputs, kLanes<T>)),
        count(ceil_div<int64_t>(vectors, kTileVectors)) {}

  int64_t first_vector(int64_t panel) const { return panel * (vectors / count) + min_of(panel, vectors % count); }
  int vectors_of(int64_t panel) const { return int(vectors / count + (panel < vectors % count)); }
  int64_t first_output(int64_t panel) const { return first_vector(panel) * kLanes<T>; }
  int64_t outputs_of(int64_t panel) const {
    return min_of(outputs - first_output(panel), int64_t(vectors_of(panel)) * kLanes<T>);
  }
  int64_t padded() const { return vectors * kLanes<T>; }
};

// target[tap][c][lane] = weight[lane * output_stride + c * channel_stride + offset of tap], zeros in lanes from
// `outputs` to `width`. Taps are `taps_of[0]` rows of `taps_of[1]`.
template <typename T, typename scalar_t>
void pack_panel(T* target, int width, const scalar_t* weight, int64_t outputs, int64_t output_stride, int64_t channels,
                int64_t channel_stride, const int64_t (&taps_of)[2], const int64_t (&tap_stride)[2]) {
  const int64_t taps = taps_of[0] * taps_of[1];
  const int64_t covered = ceil_div<int64_t>(outputs, kLanes<T>) * kLanes<T>;
  for (int64_t i = 0; covered < width && i < taps * channels; ++i)
    for (int64_t lane = covered; lane < width; ++lane) target[i * width + lane] = T(0);
  const bool dense = tap_stride[1] == 1 && tap_stride[0] == taps_of[1] && channel_stride == taps && taps > 1;
  if (!dense) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t offset = tap / taps_of[1] * tap_stride[0] + tap % taps_of[1] * tap_stride[1];
      load_tile<scalar_t, T>(target + tap * channels * width, width, weight + offset, output_stride, channel_stride,
                             outputs, channels);
    }
    return;
  }
  // [c][tap] is one run in memory: transposed piece by piece, then dealt out to the taps.
  constexpr int64_t kPiece = 64;
  alignas(64) T piece[kPiece * kPanelWidth<T>];
  for (int64_t first = 0; first < channels * taps; first += kPiece) {
    const int64_t items = min_of(kPiece, channels * taps - first);
    load_tile<scalar_t, T>(piece, width, weight + first, output_stride, 1, outputs, items);
    for (int64_t i = 0; i < items; ++i) {
      const int64_t c = (first + i) / taps, tap = (first + i) % taps;
      T* const to = target + (tap * channels + c) * width;
      for (int64_t lane = 0; lane < covered; lane += kLanes<T>) store(to + lane, load(piece + i * width + lane));
    }
  }
}

}  // namespace pvk::PVK_ISA
