// Soft NMS on CUDA: a CTA a group, each step a selection of the best score and a pass over the scores that remain.
#pragma once

#include <algorithm>

#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/nms/boxes.cuh"
#include "ops/nms/nms.h"

namespace pvk::nms {
namespace {

constexpr int kSoftThreads = 512;
constexpr int kSoftWarps = kSoftThreads / kWarpSize;
constexpr int64_t kSoftBlocks = 1024;

// By place: groups lie together.
template <typename T>
struct SoftScratch {
  Box<T>* boxes;  // [N]
  T* scores;      // [N]: -inf once selected or dropped
};

template <typename T>
int64_t soft_scratch_bytes(int64_t N) {
  return N * int64_t(sizeof(Box<T>) + sizeof(T));
}

template <typename T>
struct Best {
  T score;
  int64_t place;
};

template <typename T>
PVK_DEVICE Best<T> better(const Best<T>& a, const Best<T>& b) {
  return b.score > a.score || (b.score == a.score && b.place < a.place) ? b : a;
}

// The CTA's best, for all threads. One barrier: the caller alternates between two stages.
template <typename T>
PVK_DEVICE Best<T> best_of_block(Best<T> best, Best<T>* stage) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    best = better(best, Best<T>{shfl_xor(best.score, mask), shfl_xor(best.place, mask)});
  }
  if (threadIdx.x % kWarpSize == 0) stage[threadIdx.x / kWarpSize] = best;
  __syncthreads();
  best = stage[threadIdx.x % kSoftWarps];
#pragma unroll
  for (int mask = kSoftWarps / 2; mask > 0; mask /= 2) {
    best = better(best, Best<T>{shfl_xor(best.score, mask), shfl_xor(best.place, mask)});
  }
  return best;
}

PVK_DEVICE uint64_t group_at(const SoftNmsParams& p, int64_t place) {
  return load_group(p.groups, p.group_bytes, p.order[place] * p.groups_stride);
}

PVK_DEVICE bool begins_group(const SoftNmsParams& p, int64_t place) {
  return place == 0 || (p.groups != nullptr && group_at(p, place) != group_at(p, place - 1));
}

PVK_DEVICE int64_t end_of_group(const SoftNmsParams& p, int64_t begin) {
  if (p.groups == nullptr) return p.N;
  const uint64_t group = group_at(p, begin);
  int64_t inside = begin, outside = p.N;
  while (outside - inside > 1) {
    const int64_t middle = inside + (outside - inside) / 2;
    (group_at(p, middle) == group ? inside : outside) = middle;
  }
  return outside;
}

// The CTA takes the places [begin, end); a thread owns every 512th, in scratch that it alone writes.
template <typename T>
PVK_DEVICE void run_group(const SoftNmsParams& p, int64_t begin, int64_t end, const SoftScratch<T>& scratch,
                          Best<T> (*stage)[kSoftWarps]) {
  constexpr T kNone = -__builtin_inf();
  T* const decayed = static_cast<T*>(p.decayed);
  const auto index_of = [&](int64_t place) { return p.order != nullptr ? p.order[place] : place; };
  Best<T> mine = {kNone, p.N};
  for (int64_t place = begin + threadIdx.x; place < end; place += kSoftThreads) {
    const int64_t index = index_of(place);
    const T score = load_score<T>(p.scores, p.dtype, index * p.scores_stride);
    scratch.boxes[place] = load_box<T>(p.boxes, p.dtype, index * p.boxes_stride[0], p.boxes_stride[1]);
    scratch.scores[place] = double(score) > p.score_threshold ? score : kNone;
    decayed[index] = kNone;
    mine = better(mine, {scratch.scores[place], place});
  }
  for (int64_t step = 0; step < end - begin; ++step) {
    const Best<T> best = best_of_block(mine, stage[step % 2]);
    if (!(double(best.score) > p.score_threshold)) break;
    const Box<T> box = scratch.boxes[best.place];
    const T area = area_of(box);
    mine = {kNone, p.N};
    for (int64_t place = begin + threadIdx.x; place < end; place += kSoftThreads) {
      if (place == best.place) {
        decayed[index_of(place)] = best.score;
        scratch.scores[place] = kNone;
        continue;
      }
      T score = scratch.scores[place];
      if (!(score > kNone)) continue;
      const Box<T> other = scratch.boxes[place];
      const T inter = intersection(box, other);
      if (inter > T(0)) {
        score = decay(score, iou_of(inter, area, area_of(other)), p);
        scratch.scores[place] = score;
      }
      mine = better(mine, {score, place});
    }
  }
  __syncthreads();
}

// A CTA owns the groups that begin in its part of the places. Scores are decayed in T, each operation rounded once, so
// that the same boxes are selected as on the CPU.
template <typename T>
__global__ void __launch_bounds__(kSoftThreads) nms_soft_kernel(const __grid_constant__ SoftNmsParams p) {
  SIMT_SHARED(Best<T>[2][kSoftWarps], stage);
  const SoftScratch<T> scratch = {static_cast<Box<T>*>(p.scratch),
                                  reinterpret_cast<T*>(static_cast<Box<T>*>(p.scratch) + p.N)};
  const int64_t share = ceil_div(p.N, int64_t(gridDim.x));
  const int64_t first = blockIdx.x * share, last = min_of(first + share, p.N);
  for (int64_t place = first; place < last; ++place) {
    if (begins_group(p, place)) run_group<T>(p, place, end_of_group(p, place), scratch, stage);
  }
}

// A thread rounds one of the sorted scores; the one with the last selected box writes the count.
template <typename scalar_t>
__global__ void __launch_bounds__(kSoftThreads) nms_soft_finish_kernel(const __grid_constant__ SoftNmsParams p) {
  using T = opmath_t<scalar_t>;
  const T* const sorted = static_cast<const T*>(p.sorted);
  const auto is_selected = [&](int64_t rank) { return rank < p.N && sorted[rank] > T(-__builtin_inf()); };
  const int64_t rank = int64_t(blockIdx.x) * kSoftThreads + threadIdx.x;
  if (rank >= p.N) return;
  static_cast<scalar_t*>(p.kept_scores)[rank] = from_opmath<scalar_t>(sorted[rank]);
  if (is_selected(rank) && !is_selected(rank + 1)) *p.count = rank + 1;
  if (rank == 0 && !is_selected(0)) *p.count = 0;
}

template <typename T>
void soft_decay(const SoftNmsParams& p, Stream stream) {
  const int64_t blocks = p.groups == nullptr ? 1 : std::min(p.N, kSoftBlocks);
  launch(nms_soft_kernel<T>, {dim3(unsigned(blocks)), dim3(kSoftThreads), 0, stream}, p);
}

}  // namespace
}  // namespace pvk::nms
