// The kernels of a GatherGemm. A block owns a tile of rows (pixels) by columns (channels of the result) of one group
// and phase, and walks along the reduction, or a part of it where that is split; parts are added in their order by a
// second kernel. Both operands lie along the reduction in shared memory.
#pragma once

#include "core/fma_tile.cuh"
#include "core/launch.h"
#include "core/mma_tile.cuh"
#include "ops/conv2d/finish.cuh"

namespace pvk::conv2d {

template <typename scalar_t, int BLOCK_M, int BLOCK_N, int WARP_M, int WARP_N, int MIN_BLOCKS>
struct MmaPolicy {
  using Scalar = scalar_t;
  using Tile = MmaTile<scalar_t, BLOCK_M, BLOCK_N, WARP_M, WARP_N, Major::kK, Major::kK>;
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kMinBlocks = MIN_BLOCKS;
};

template <typename scalar_t, int BLOCK_M, int BLOCK_N, int TM, int TN>
struct FmaPolicy {
  using Scalar = scalar_t;
  using Tile = FmaTile<scalar_t, BLOCK_M, BLOCK_N, 64 / int(sizeof(scalar_t)), true, true, TM, TN>;
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kMinBlocks = 1;
};

template <typename Policy, bool kVectors>
struct GatherLayout {
  using Scalar = typename Policy::Scalar;
  using Tile = typename Policy::Tile;
  static constexpr int kBlockM = Policy::kBlockM, kBlockN = Policy::kBlockN, kThreads = Tile::kThreads;
  using Gather = std::conditional_t<kVectors, VectorGather<typename Tile::A, Scalar, kBlockM, kThreads>,
                                    ElementGather<typename Tile::A, Scalar, kBlockM, kThreads>>;
  using Finish = FinishTile<typename Tile::Sum, kBlockM, kBlockN>;
  static constexpr int kStages = kVectors ? 4 : 2;
  static constexpr int kStage = Tile::A::kElements + Tile::B::kElements;
  static constexpr int kStageBytes = kStages * kStage * int(sizeof(Scalar));
  // What follows the reduction takes the place of the stages.
  static constexpr int kBytes = max_of(kStageBytes + Gather::kTableBytes, int(sizeof(Finish)));
};

// The rows of the weight that make the block's columns, by vectors along the reduction.
template <typename Layout>
struct WeightRows {
  using Scalar = typename Layout::Scalar;
  using Operand = typename Layout::Tile::B;
  static constexpr int kVec = kVec16<Scalar>, kDepth = 4 * kVec, kThreads = Layout::kThreads;
  static constexpr int kVectors = Layout::kBlockN * 4, kCount = ceil_div(kVectors, kThreads);

  const Scalar* rows;
  int64_t k, end;  // the next vector's place, and of the reduction
  int64_t left;    // rows that there are

  PVK_DEVICE void begin(const GatherGemm& p, const GatherBlock& block, int64_t column0, int64_t step) {
    const int64_t index = (block.phase_class * p.groups + block.group) * p.outputs + column0;
    rows = static_cast<const Scalar*>(p.weight) + index * p.pitch;
    left = p.outputs - column0;
    end = block.depth;
    k = step * kDepth + int(threadIdx.x) % 4 * kVec;
  }

  PVK_DEVICE void load(const GatherGemm& p, Scalar* stage) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int vector = int(threadIdx.x) + i * kThreads, row = vector / 4;
      if (kVectors % kThreads != 0 && vector >= kVectors) break;
      const bool inside = row < left && k < end;
      const Scalar* const from = inside ? rows + row * p.pitch + k : static_cast<const Scalar*>(p.weight);
      cp_async<16>(stage + Operand::at(row, vector % 4 * kVec), from, inside ? 16u : 0u);
    }
    k += kDepth;
  }
};

// Where block `index` of the grid is: phases, groups, parts of the reduction, rows of tiles, columns of tiles.
struct GatherPlace {
  GatherBlock block;
  int64_t part, column0;
};

// In shared memory: a block has one, and reads it again where it needs it, rather than hold it in registers.
template <int BLOCK_M, int BLOCK_N>
PVK_DEVICE void find_place(GatherPlace& place, const GatherGemm& p, const Plan& plan, int64_t splits) {
  int64_t index = blockIdx.x;
  const int64_t column = index % plan.tiles_n;
  index /= plan.tiles_n;
  const int64_t row = index % plan.tiles_m;
  index /= plan.tiles_m;
  place.part = index % splits;
  index /= splits;
  GatherBlock& block = place.block;
  block.group = index % p.groups;
  index /= p.groups;
  block.phase[1] = index % p.phases(1);
  block.phase[0] = index / p.phases(1);
  block.rows = p.images;
  block.depth = p.channels;
  for (int a = 0; a < 2; ++a) {
    block.axes[a] = phase_of(p.axes[a], p.transposed, block.phase[a]);
    block.rows *= block.axes[a].pixels;
    block.depth *= block.axes[a].taps;
  }
  block.phase_class = block.axes[0].first * p.classes(1) + block.axes[1].first;
  block.row0 = row * BLOCK_M;
  place.column0 = column * BLOCK_N;
}

template <typename Policy, bool kVectors>
__global__ void __launch_bounds__(Policy::Tile::kThreads, Policy::kMinBlocks)
    gather_gemm_kernel(const GatherGemm p, const Plan plan) {
  using Layout = GatherLayout<Policy, kVectors>;
  using Scalar = typename Layout::Scalar;
  using Tile = typename Layout::Tile;
  constexpr int kStages = Layout::kStages, kDepth = WeightRows<Layout>::kDepth;
  SIMT_DYN_SHARED(unsigned char, shared);
  Scalar* const stages = reinterpret_cast<Scalar*>(shared);
  unsigned char* const table = shared + Layout::kStageBytes;
  const auto a_of = [&](int64_t step) { return stages + int(step % kStages) * Layout::kStage; };
  const auto b_of = [&](int64_t step) { return a_of(step) + Tile::A::kElements; };

  SIMT_SHARED(GatherPlace, place);
  if (threadIdx.x == 0) find_place<Layout::kBlockM, Layout::kBlockN>(place, p, plan, plan.splits);
  __syncthreads();
  const GatherBlock& block = place.block;
  if (block.row0 >= block.rows) return;
  const int64_t steps = ceil_div(block.depth, int64_t(kDepth));
  const int64_t first = steps * place.part / plan.splits, end = steps * (place.part + 1) / plan.splits;
  const int count = int(end - first), thread = int(threadIdx.x);

  Tile tile;
  tile.clear();
  if (count > 0) {
    typename Layout::Gather gather;
    WeightRows<Layout> weight;
    gather.begin(p, block, table, first);
    weight.begin(p, block, place.column0, first);
    const auto load = [&](int step) {
      if (step < count) {
        gather.load(p, block, a_of(step), table, step % 2);
        weight.load(p, b_of(step));
      }
      cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load(step);
    gather.store(a_of(0));
#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the step is there, and the stage before it is free
      load(step + kStages - 1);
      gather.tabulate(p, block, table, first + step + 2, step % 2);
      tile.multiply(a_of(step), b_of(step), thread);
      if (step + 1 < count) gather.store(a_of(step + 1));
    }
    cp_async_wait_all();
  }

  if (plan.splits > 1) {
    using Sum = typename Tile::Sum;
    Sum* const partial = static_cast<Sum*>(p.partial) + int64_t(blockIdx.x) * (Layout::kBlockM * Layout::kBlockN);
    tile.for_each(thread, [&](int row, int column, const auto& values) {
#pragma unroll
      for (int e = 0; e < Tile::kRun; ++e) partial[row * Layout::kBlockN + column + e] = values[e];
    });
    return;
  }
  __syncthreads();  // the stages are free
  auto& out = *reinterpret_cast<typename Layout::Finish*>(shared);
  tile.for_each(thread, [&](int row, int column, const auto& values) {
#pragma unroll
    for (int e = 0; e < Tile::kRun; ++e) out.sums[row * out.kPitch + column + e] = values[e];
  });
  place_rows<typename Tile::Sum, Layout::kBlockM, Layout::kBlockN, Layout::kThreads>(out, p, block, place.column0);
  __syncthreads();
  finish<Scalar, typename Tile::Sum, Layout::kBlockM, Layout::kBlockN, Layout::kThreads>(out, p, place.column0);
}

// A block owns a tile of the result, whose parts it adds in their order. Of each file its own: several have it in
// float.
template <typename scalar_t, typename Sum, int BLOCK_M, int BLOCK_N, int THREADS>
static __global__ void __launch_bounds__(THREADS, 2) gather_gemm_sum_kernel(const GatherGemm p, const Plan plan) {
  using Finish = FinishTile<Sum, BLOCK_M, BLOCK_N>;
  constexpr int kElements = BLOCK_M * BLOCK_N;
  SIMT_DYN_SHARED(unsigned char, shared);
  Finish& out = *reinterpret_cast<Finish*>(shared);
  SIMT_SHARED(GatherPlace, place);
  if (threadIdx.x == 0) find_place<BLOCK_M, BLOCK_N>(place, p, plan, 1);
  __syncthreads();
  if (place.block.row0 >= place.block.rows) return;
  const int64_t tiles = plan.tiles_m * plan.tiles_n, group = int64_t(blockIdx.x) / tiles;
  const Sum* const partial =
      static_cast<const Sum*>(p.partial) + (group * plan.splits * tiles + int64_t(blockIdx.x) % tiles) * kElements;
  for (int i = int(threadIdx.x); i < kElements; i += THREADS) {
    Sum sum = 0;
    for (int64_t part = 0; part < plan.splits; ++part) sum += __ldg(partial + part * tiles * kElements + i);
    out.sums[i / BLOCK_N * out.kPitch + i % BLOCK_N] = sum;
  }
  place_rows<Sum, BLOCK_M, BLOCK_N, THREADS>(out, p, place.block, place.column0);
  __syncthreads();
  finish<scalar_t, Sum, BLOCK_M, BLOCK_N, THREADS>(out, p, place.column0);
}

template <typename Policy, bool kVectors>
void run_tile(const GatherGemm& p, const Plan& plan, Stream stream) {
  using Layout = GatherLayout<Policy, kVectors>;
  using Sum = typename Layout::Tile::Sum;
  const int64_t blocks = plan.tiles_m * plan.tiles_n * p.groups * p.phases(0) * p.phases(1);
  launch(gather_gemm_kernel<Policy, kVectors>,
         {dim3(grid_of("conv2d", blocks * plan.splits)), dim3(Layout::kThreads), size_t(Layout::kBytes), stream}, p,
         plan);
  if constexpr (Layout::kBlockM == 64 && Layout::kBlockN == 64) {  // the only one that is split
    if (plan.splits > 1) {
      constexpr int kThreads = 256;
      launch(gather_gemm_sum_kernel<typename Layout::Scalar, Sum, 64, 64, kThreads>,
             {dim3(grid_of("conv2d", blocks)), dim3(kThreads), sizeof(typename Layout::Finish), stream}, p, plan);
    }
  }
}

template <typename Policy>
void run_policy(const GatherGemm& p, const Plan& plan, Stream stream) {
  if (plan.vectors) {
    run_tile<Policy, true>(p, plan, stream);
  } else {
    run_tile<Policy, false>(p, plan, stream);
  }
}

template <typename scalar_t>
void run_mma(const GatherGemm& p, const Plan& plan, Stream stream) {
  switch (plan.tile) {
    case TileSize::k64x64:
      return run_policy<MmaPolicy<scalar_t, 64, 64, 32, 32, 4>>(p, plan, stream);
    case TileSize::k128x32:
      return run_policy<MmaPolicy<scalar_t, 128, 32, 32, 32, 3>>(p, plan, stream);
    case TileSize::k128x64:
      return run_policy<MmaPolicy<scalar_t, 128, 64, 64, 32, 2>>(p, plan, stream);
    case TileSize::k128x128:
      return run_policy<MmaPolicy<scalar_t, 128, 128, 64, 32, 1>>(p, plan, stream);
  }
}

}  // namespace pvk::conv2d
