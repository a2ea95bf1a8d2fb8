// A chain of layers in one launch: a block, or a cluster of blocks, takes some images through all of them.
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "graph/chain.h"
#include "graph/chain_layer.cuh"

namespace pvk::graph {
namespace {

#if defined(PVK_SIMT) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// A block, or a cluster of at most 8, owns p.images images. Maps lie in shared memory, [H, W, C] with a border of
// zeros, whole in every block: of two buffers a layer reads one and writes the other. Warps take tiles of 16 channels
// by 8 pixels; blocks of a cluster take every other tile, and write it into the maps of all. Packed weights go from L2
// into registers. Sums are in float32 and in a fixed order; between layers results are rounded as those of single
// layers.
template <typename scalar_t, bool CLUSTER>
__global__ void __launch_bounds__(kThreads, 1) graph_chain_kernel(const __grid_constant__ ChainParams p) {
  if constexpr (!CLUSTER || kHasClusters) {
    SIMT_DYN_SHARED(unsigned char, shared);
    const Place<scalar_t, CLUSTER> at(p, shared);
    for (int i = 0; i < p.count; ++i) write_table(p.layers[i], at.table());
    load_input(p, at);
    at.sync();
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
      if (i + 1 < p.count) clear_border(p.layers[i + 1], at.map(p, i + 1), at.images);
      if constexpr (sizeof(scalar_t) == 2) {
        run_layer<HalfProduct<scalar_t>>(p, at, i);
      } else if (p.layers[i].tf32) {
        run_layer<Tf32Product>(p, at, i);
      } else {
        run_layer<FloatProduct>(p, at, i);
      }
      if (i + 1 < p.count) at.sync();
    }
  }
}

struct Device {
  int multiprocessors, shared_bytes, clusters;
  Device() {
    int device = 0;
    PVK_CUDA_CHECK(cudaGetDevice(&device));
    PVK_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    PVK_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    PVK_CUDA_CHECK(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  }
};

struct Split {
  int blocks;  // in a cluster
  int64_t images;
};

// The largest clusters with which all images are under way at once: weights are then read for most images together.
Split split_images(ChainParams& p, const Device& device) {
  const auto fits = [&](int64_t images) { return place(p, images) <= device.shared_bytes; };
  for (int blocks = device.clusters != 0 ? 8 : 1; blocks > 1; blocks /= 2) {
    const int64_t images = ceil_div(p.N, int64_t(max_of(1, device.multiprocessors / blocks)));
    if (fits(images)) return {blocks, images};
  }
  int64_t images = min_of(ceil_div(p.N, int64_t(device.multiprocessors)), int64_t(64));
  while (images > 1 && !fits(images)) --images;
  return {1, images};
}

// The largest tiles of which every warp has one. Where there are fewer than warps, several sum one.
void choose_tile(ChainLayer& layer, const Split& split, bool wide) {
  const int64_t columns = ceil_div(split.images * layer.pixels(), int64_t(8));
  const auto in_block = [&](int64_t mt, int64_t nt) {
    return ceil_div(ceil_div(int64_t(layer.m_tiles()), mt) * ceil_div(columns, nt), int64_t(split.blocks));
  };
  layer.splits = 1;
  layer.tile = kSplit;
  if (wide && in_block(2, 4) >= kWarps) {
    layer.tile = kEight;
  } else if (in_block(1, 2) >= kWarps) {
    layer.tile = kTwo;
  } else {
    const int64_t most = min_of(kWarps / min_of(in_block(1, 1), int64_t(kWarps)), int64_t(layer.k_tiles()));
    while (layer.splits * 2 <= most) layer.splits *= 2;
  }
}

template <typename scalar_t>
void run(const ChainParams& p, const Split& split, size_t bytes, Stream stream) {
  const int64_t blocks = ceil_div(p.N, split.images) * split.blocks;
  const LaunchConfig config = {dim3(grid_of("_graph", blocks)), dim3(kThreads), bytes, stream, unsigned(split.blocks)};
  launch(split.blocks > 1 ? graph_chain_kernel<scalar_t, true> : graph_chain_kernel<scalar_t, false>, config, p);
}

}  // namespace

bool chain_fits(ChainParams& p) {
  return place(p, 1) <= Device().shared_bytes;
}

void run_chain(ChainParams& p, Stream stream) {
  const Split split = split_images(p, Device());
  const size_t bytes = size_t(place(p, split.images));
  for (int i = 0; i < p.count; ++i) choose_tile(p.layers[i], split, p.dtype != DType::kFloat32);
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float>(p, split, bytes, stream);
    case DType::kFloat16:
      return run<__half>(p, split, bytes, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, split, bytes, stream);
    case DType::kFloat64:
      break;
  }
  throw std::runtime_error("_graph: expected a chain of float32, float16 or bfloat16");
}

}  // namespace pvk::graph
