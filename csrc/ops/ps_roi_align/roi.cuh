// Position-sensitive RoI align and pool: what its CUDA kernels share.
#pragma once

#include "core/math.h"
#include "core/warp.cuh"
#include "ops/ps_roi_align/ps_roi_align.h"

namespace pvk::ps_roi_align {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / kWarpSize;

template <typename T>
PVK_DEVICE Roi<T> load_roi(const PsRoiParams& p, int64_t k) {
  T box[5];
  load_strided(p.boxes, p.boxes_dtype, k * p.boxes_stride[0], p.boxes_stride[1], box);
  return make_roi<T>(p, box[0], box[1], box[2], box[3], box[4]);
}

// A plane of the map: bin (ph, pw) of channel c.
struct Plane {
  int64_t c;
  int ph, pw;
};

PVK_DEVICE Plane find_plane(const PsRoiParams& p, int plane) {
  const int bins = int(p.PH * p.PW), bin = plane % bins;
  return {plane / bins, bin / int(p.PW), bin % int(p.PW)};
}

}  // namespace pvk::ps_roi_align
