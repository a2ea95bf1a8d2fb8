// RoI align: what its CUDA kernels share.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/roi_align/roi_align.h"

namespace pvk::roi_align {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / kWarpSize;

// How a launch divides the work: blockIdx.y takes `channels` channels, blockIdx.z shares the bins.
struct ForwardPlan {
  int64_t channels;
  bool vector_store;  // the output has C stride 1 and allows 16-byte stores
};

// How a launch divides the maps: those of level l are tiles [first_tile[l], first_tile[l + 1]).
struct BackwardPlan {
  uint32_t first_tile[kMaxLevels];
  bool vector_store;  // the maps have C stride 1 and allow 16-byte stores
};

// RoI k; one without a result has no samples.
template <typename T>
PVK_DEVICE Roi<T> load_roi(const RoiAlignParams& p, int64_t k) {
  T box[5];
  load_strided(p.boxes, p.boxes_dtype, k * p.boxes_stride[0], p.boxes_stride[1], box);
  Roi<T> roi = make_roi<T>(p, box[0], box[1], box[2], box[3], box[4]);
  if (roi.image < 0) {
    roi.y = roi.x = {T(0), T(0), T(0)};
    roi.inverse_count = T(0);
  }
  return roi;
}

}  // namespace pvk::roi_align
