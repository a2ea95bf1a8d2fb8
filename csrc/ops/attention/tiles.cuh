// What the kernels of attention share: the shape of a block's work, rows between global and shared memory, and from
// products to scores.
//
// A block owns rows (queries or keys), which stay in shared memory, and walks along tiles of columns (the others),
// which come by cp.async, the next tile beside the products of this one.
#pragma once

#include "core/activation.cuh"
#include "core/async.cuh"
#include "core/launch.h"
#include "ops/attention/cuda_kernels.h"
#include "ops/attention/products.cuh"

namespace pvk::attention {

constexpr int kMostShared = 99 * 1024;  // of a block, on every architecture

struct Choice {
  int warps, columns, stages;
};

// Both gradients of a warp's keys fit into its registers where features are few; else a block has one of the two.
template <int FEATURES>
constexpr bool kBothFit = FEATURES <= 128;

// RESIDENT tiles of rows, and two of columns a stage.
template <typename scalar_t, int FEATURES, int RESIDENT, int EXTRAS>
struct Shape {
  static constexpr int kVec = kVec16<scalar_t>, kRow = kPitch<scalar_t, FEATURES>;
  // In elements; a warp's part of the weights is beside its rows.
  static constexpr int stage_size(int columns) { return 2 * columns * kRow; }
  static constexpr int rows_size(int warps, int columns) {
    const int weights = kIsHalf<scalar_t> ? 0 : columns + kVec;
    return warps * kWarpRows<scalar_t> * (RESIDENT * kRow + weights);
  }
  static constexpr int bytes(Choice choice) {
    return (rows_size(choice.warps, choice.columns) + choice.stages * stage_size(choice.columns)) *
           int(sizeof(scalar_t));
  }
  // Whether a thread's registers hold sums, of each resident tile where the features are not in two parts, and scores,
  // with what is added to them.
  static constexpr bool fits_registers(Choice choice) {
    constexpr int kMost = EXTRAS == kPlain ? 160 : EXTRAS == kBiased ? 144 : 112;
    const int of_row = (kBothFit<FEATURES> ? RESIDENT : 1) * FEATURES + RESIDENT * choice.columns;
    return choice.columns < 64 || of_row / 4 * kLaneRows<scalar_t> * int(sizeof(opmath_t<scalar_t>)) / 4 <= kMost;
  }
  // On a multiprocessor, by registers.
  static constexpr int least_blocks() {
    if (!kIsHalf<scalar_t>) return 2;
    if (RESIDENT == 1 && EXTRAS == kPlain) return FEATURES <= 64 ? 4 : FEATURES <= 96 ? 3 : 2;
    return FEATURES <= 32 && EXTRAS + RESIDENT <= 2 ? 3 : 2;
  }
  static constexpr Choice choose() {
    constexpr Choice kChoices[] = {{4, 64, 2}, {4, 32, 2}, {4, 16, 2}, {2, 16, 2}, {4, 16, 1}, {2, 16, 1}, {1, 16, 1}};
    for (const Choice& choice : kChoices)
      if (bytes(choice) <= kMostShared && fits_registers(choice)) return choice;
    return {};
  }

  static constexpr Choice kChoice = choose();
  static constexpr int kMostWarps = kChoice.warps, kColumns = kChoice.columns, kStages = kChoice.stages,
                       kLeastBlocks = least_blocks();
  static constexpr int kStage = stage_size(kColumns);
  static_assert(kMostWarps > 0);

  static int warps_of(int64_t rows) {
    const int64_t wanted = ceil_div(rows, int64_t(kWarpRows<scalar_t>));
    return wanted > 2 ? kMostWarps : int(min_of(wanted, int64_t(kMostWarps)));
  }
  static size_t shared_bytes(int warps, int64_t steps) {
    return size_t(bytes({warps, kColumns, steps > 1 ? kStages : 1}));
  }
};

// What is where in a block's shared memory; `rows` is of the block.
template <typename Shape, typename scalar_t>
struct Shared {
  scalar_t *resident, *weights, *stages;
  int rows;

  PVK_DEVICE Shared(unsigned char* shared, int resident_tiles) {
    rows = int(blockDim.x) / kWarpSize * kWarpRows<scalar_t>;
    resident = reinterpret_cast<scalar_t*>(shared);
    weights = resident + resident_tiles * rows * Shape::kRow;
    stages = weights + (kIsHalf<scalar_t> ? 0 : rows * kWeightPitch<scalar_t, Shape::kColumns>);
  }
  // The warp's rows of a resident tile.
  PVK_DEVICE scalar_t* mine(int tile) const {
    return resident + (tile * rows + int(threadIdx.x) / kWarpSize * kWarpRows<scalar_t>)*Shape::kRow;
  }
  PVK_DEVICE scalar_t* my_weights() const {
    return weights + int(threadIdx.x) / kWarpSize * kWarpRows<scalar_t> * kWeightPitch<scalar_t, Shape::kColumns>;
  }
  // Tile 0 or 1 of step n.
  PVK_DEVICE scalar_t* stage(int64_t n, int tile) const {
    return stages + int(n % Shape::kStages) * Shape::kStage + tile * Shape::kColumns * Shape::kRow;
  }
};

// load(n) and then compute(n) of each step, whose copies run beside the products of the step before.
template <int STAGES, typename Load, typename Compute>
PVK_DEVICE void walk(int64_t count, const Load& load, const Compute& compute) {
  if (count > 0) {
    load(0);
    cp_async_commit();
  }
#pragma unroll 1
  for (int64_t n = 0; n < count; ++n) {
    cp_async_wait<0>();
    __syncthreads();
    if (STAGES > 1 && n + 1 < count) {
      load(n + 1);
      cp_async_commit();
    }
    compute(n);
    if (STAGES == 1 && n + 1 < count) {
      __syncthreads();
      load(n + 1);
      cp_async_commit();
    }
  }
}

// ---- rows in global memory ----

// Of one head.
template <typename scalar_t>
struct Rows {
  scalar_t* data;
  int64_t stride;
  int features;

  PVK_DEVICE Rows(const void* all, const int64_t (&strides)[3], int64_t b, int64_t h, int64_t features)
      : data(static_cast<scalar_t*>(const_cast<void*>(all)) + b * strides[0] + h * strides[1]),
        stride(strides[2]),
        features(int(features)) {}
  PVK_DEVICE bool has_vectors() const {
    return (reinterpret_cast<uintptr_t>(data) | uintptr_t(stride * int64_t(sizeof(scalar_t)))) % 16 == 0;
  }
};

// Rows [first, first + count), by the whole block; zeros from `end` on, where a row is absent, and beyond the features.
template <int FEATURES, typename scalar_t>
PVK_DEVICE void load_rows(scalar_t* shared, const Rows<scalar_t>& rows, int64_t first, int count, int64_t end,
                          const uint8_t* absent = nullptr) {
  constexpr int V = kVec16<scalar_t>, kVectors = FEATURES / V;
  const bool has_vectors = rows.has_vectors();
#pragma unroll 1
  for (int i = int(threadIdx.x); i < count * kVectors; i += int(blockDim.x)) {
    const int row = i / kVectors, feature = i % kVectors * V;
    const bool is_there = first + row < end && !(absent != nullptr && __ldg(absent + first + row) != 0);
    const int left = is_there ? min_of(V, rows.features - feature) : 0;
    const scalar_t* const from = rows.data + (first + row) * rows.stride + feature;
    scalar_t* const to = shared + row * kPitch<scalar_t, FEATURES> + feature;
    if (has_vectors) {
      cp_async<16>(to, left > 0 ? from : rows.data, unsigned(max_of(left, 0)) * unsigned(sizeof(scalar_t)));
    } else {
      VecN<scalar_t, V> vec = {};
#pragma unroll
      for (int e = 0; e < V; ++e)
        if (e < left) vec.data[e] = __ldg(from + e);
      *reinterpret_cast<VecN<scalar_t, V>*>(to) = vec;
    }
  }
}

// Stores the warp's rows, the first of them `first`, before `end`, through its part of shared memory. f(r, value): what
// is stored of a sum in the lane's row r.
template <int FEATURES, typename scalar_t, typename F>
PVK_DEVICE void store_rows(const Rows<scalar_t>& rows, int64_t first, int64_t end, Sums<scalar_t, FEATURES>& sums,
                           scalar_t* shared, int lane, const F& f) {
  using Fragment = Sums<scalar_t, FEATURES>;
  constexpr int V = kVec16<scalar_t>, kVectors = FEATURES / V, P = kPitch<scalar_t, FEATURES>, kRun = Fragment::kRun;
  sync_warp();
#pragma unroll
  for (int r = 0; r < Fragment::kRows; ++r) {
#pragma unroll
    for (int c = 0; c < Fragment::kCount; c += kRun) {
      VecN<scalar_t, kRun> run;
#pragma unroll
      for (int e = 0; e < kRun; ++e) run.data[e] = from_opmath<scalar_t>(f(r, sums.at(r, c + e)));
      *reinterpret_cast<VecN<scalar_t, kRun>*>(shared + sums.row(lane, r) * P + sums.column(lane, c)) = run;
    }
  }
  sync_warp();
  const bool has_vectors = rows.has_vectors();
#pragma unroll 1
  for (int i = lane; i < kWarpRows<scalar_t> * kVectors; i += kWarpSize) {
    const int row = i / kVectors, feature = i % kVectors * V, left = rows.features - feature;
    if (first + row >= end || left <= 0) continue;
    const auto vec = vector_at(shared + row * P + feature);
    scalar_t* const to = rows.data + (first + row) * rows.stride + feature;
    if (has_vectors && left >= V) {
      store_vec(to, vec);
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e)
        if (e < left) to[e] = vec.data[e];
    }
  }
}

}  // namespace pvk::attention
