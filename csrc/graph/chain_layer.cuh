// One layer of a chain by one block, or by the blocks of a cluster: what they share, and the ends of the products.
#pragma once

#include "core/activation.cuh"
#include "core/cluster.cuh"
#include "graph/chain.h"
#include "graph/chain_product.cuh"

namespace pvk::graph {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTileBytes = int(kChainScratchBytes) / kWarps;  // 16 x 8 of float32

// 1 x 1, where k may be split among warps; 1 x 2; 2 x 4, of 16-bit types.
enum Tile : int { kSplit, kTwo, kEight };

// A block's shared memory, and the images that it, or its cluster, computes. Maps are whole in every block.
template <typename scalar_t, bool CLUSTER>
struct Place {
  unsigned char* const shared;
  const int rank, blocks;  // in the cluster
  int64_t first;           // image
  int images;

  PVK_DEVICE Place(const ChainParams& p, unsigned char* memory)
      : shared(memory), rank(CLUSTER ? int(cluster_rank()) : 0), blocks(CLUSTER ? int(cluster_size()) : 1) {
    first = int64_t(blockIdx.x / blocks) * p.images;
    images = int(min_of(int64_t(p.images), p.N - first));
  }
  PVK_DEVICE scalar_t* map(const ChainParams& p, int layer) const {
    return reinterpret_cast<scalar_t*>(shared + p.map_begin[layer % 2]);
  }
  PVK_DEVICE int* table() const { return reinterpret_cast<int*>(shared + kChainScratchBytes); }
  PVK_DEVICE unsigned char* scratch(int warp) const { return shared + warp * kTileBytes; }

  // All blocks have written their part of a map, everywhere.
  PVK_DEVICE void sync() const {
    if constexpr (CLUSTER) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
  template <typename T>
  PVK_DEVICE T* in_block(T* mine, int other) const {
    if constexpr (CLUSTER) {
      return map_shared(mine, unsigned(other));
    } else {
      return mine;
    }
  }
};

template <typename scalar_t>
struct alignas(4 * sizeof(scalar_t)) Group {
  scalar_t values[4];
};

template <typename scalar_t>
PVK_DEVICE void clear(scalar_t* map, int groups, int first, int step) {
  Group<scalar_t> zero;
  for (int i = 0; i < 4; ++i) zero.values[i] = from_opmath<scalar_t>(0.f);
  for (int i = first; i < groups; i += step) reinterpret_cast<Group<scalar_t>*>(map)[i] = zero;
}

// Where the groups of 4 factors of a layer lie, from the first pixel that a column reads.
PVK_DEVICE void write_table(const ChainLayer& layer, int* table) {
  const int groups = layer.channel_groups(), taps = layer.R * layer.S;
  for (int i = int(threadIdx.x); i < layer.k_tiles() * 4; i += kThreads) {
    const int tap = i / groups, r = tap / layer.S, s = tap % layer.S;
    const int pixel = r * layer.dilation[0] * layer.columns + s * layer.dilation[1];
    table[layer.table + i] = tap < taps ? pixel * layer.pitch + i % groups * 4 : -1;
  }
}

// The border of a map that is to be written. In the interior, channels beyond the last tile of m are never read.
template <typename scalar_t>
PVK_DEVICE void clear_border(const ChainLayer& layer, scalar_t* map, int images) {
  if (layer.rows == layer.H && layer.columns == layer.W) return;
  const int pixels = layer.rows * layer.columns;
  for (int i = int(threadIdx.x); i < images * pixels; i += kThreads) {
    const int h = i % pixels / layer.columns - layer.padding[0], w = i % layer.columns - layer.padding[1];
    if (h >= 0 && h < layer.H && w >= 0 && w < layer.W) continue;
    clear(map + i / pixels * layer.image + i % pixels * layer.pitch, layer.pitch / 4, 0, 1);
  }
}

// The images, with the border and the missing channels zero.
template <typename scalar_t, bool CLUSTER>
PVK_DEVICE void load_input(const ChainParams& p, const Place<scalar_t, CLUSTER>& at) {
  const ChainLayer& layer = p.layers[0];
  scalar_t* const map = at.map(p, 0);
  clear(map, at.images * layer.image / 4, int(threadIdx.x), kThreads);
  __syncthreads();
  const int C = layer.C, pixels = layer.H * layer.W;
  const bool by_channels = p.input_stride[1] == 1;
#pragma unroll 4
  for (int i = int(threadIdx.x); i < at.images * C * pixels; i += kThreads) {
    const int image = i / (C * pixels), within = i % (C * pixels);
    const int c = by_channels ? within % C : within / pixels, pixel = by_channels ? within / C : within % pixels;
    const int h = pixel / layer.W, w = pixel % layer.W;
    const int64_t from =
        (at.first + image) * p.input_stride[0] + c * p.input_stride[1] + h * p.input_stride[2] + w * p.input_stride[3];
    map[image * layer.image + ((h + layer.padding[0]) * layer.columns + w + layer.padding[1]) * layer.pitch + c] =
        __ldg(static_cast<const scalar_t*>(p.input) + from);
  }
}

// A column of the product: a pixel of the convolution. Four of a pooling window follow each other.
struct Column {
  int image, h, w;  // of the output
  int part;         // of the window
  PVK_DEVICE Column(const ChainLayer& layer, int column) {
    part = layer.pool ? column % 4 : 0;
    const int pixel = layer.pool ? column / 4 : column, pixels = layer.rows_out() * layer.columns_out();
    image = pixel / pixels;
    h = pixel % pixels / layer.columns_out();
    w = pixel % layer.columns_out();
  }
  PVK_DEVICE int source(const ChainLayer& layer) const {
    const int row = (layer.pool ? 2 * h + part / 2 : h) * layer.stride[0];
    const int column = (layer.pool ? 2 * w + part % 2 : w) * layer.stride[1];
    return image * layer.image + (row * layer.columns + column) * layer.pitch;
  }
};

// Where a column of layer i goes: in the next layer's map, or in the output.
template <typename scalar_t, bool CLUSTER>
PVK_DEVICE int64_t target_of(const ChainParams& p, const Place<scalar_t, CLUSTER>& at, int i, int column) {
  if (column >= at.images * p.layers[i].pixels()) return -1;
  const Column c(p.layers[i], column);
  if (i + 1 == p.count)
    return (at.first + c.image) * p.output_stride[0] + c.h * p.output_stride[2] + c.w * p.output_stride[3];
  const ChainLayer& next = p.layers[i + 1];
  return c.image * next.image + ((c.h + next.padding[0]) * next.columns + c.w + next.padding[1]) * next.pitch;
}

PVK_DEVICE float larger(float a, float b) {
  return b > a || b != b ? b : a;  // as max_pool2d: NaN wins
}

// What follows the sum, for rows g and g + 8 of a tile; rows beyond the layer's are zero.
template <typename scalar_t>
struct Ends {
  float bias[2], scale[2], shift[2];
  bool there[2];
  PVK_DEVICE void load(const ChainLayer& layer, int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = row + 8 * half;
      there[half] = k < layer.K;
      bias[half] = value(layer.bias, layer.bias_dtype, k, there[half], 0.f);
      scale[half] = value(layer.scale, layer.scale_dtype, k, there[half], 1.f);
      shift[half] = value(layer.shift, layer.scale_dtype, k, there[half], 0.f);
    }
  }
  PVK_DEVICE static float value(const void* values, DType dtype, int k, bool there, float otherwise) {
    if (values == nullptr || !there) return otherwise;
    return dtype == DType::kFloat32 ? __ldg(static_cast<const float*>(values) + k)
                                    : to_opmath(__ldg(static_cast<const scalar_t*>(values) + k));
  }
  PVK_DEVICE float affine(float sum, int half) const { return (sum + bias[half]) * scale[half] + shift[half]; }
};

// The rarer ones one after another, by way of the warp's scratch: their code, unrolled, would fill the cache.
PVK_DEVICE void activate_all(Activation activation, float (&values)[2][2], float* mine) {
  if (activation == Activation::kNone) return;
  if (activation == Activation::kRelu) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i / 2][i % 2] = activate(Activation::kRelu, values[i / 2][i % 2]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) mine[i] = values[i / 2][i % 2];
#pragma unroll 1
  for (int i = 0; i < 4; ++i) mine[i] = activate(activation, mine[i]);
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i / 2][i % 2] = mine[i];
  sync_warp();  // others write there next
}

// One tile into the output, or into the next layer's map in every block of the cluster. `target` is where column g
// goes, or -1.
template <typename scalar_t, bool CLUSTER>
PVK_DEVICE void store_tile(const ChainParams& p, const Place<scalar_t, CLUSTER>& at, int i, const MmaC& sums, int m,
                           int64_t target, const Ends<scalar_t>& ends, int warp, int lane) {
  const ChainLayer& layer = p.layers[i];
  const int g = lane / 4, t = lane % 4;
  float values[2][2];  // half, column
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < 2; ++j) values[half][j] = ends.affine(sums.values[half * 2 + j], half);
  activate_all(layer.activation, values, reinterpret_cast<float*>(at.scratch(warp)) + lane * 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 2; ++j) values[half][j] = ends.there[half] ? values[half][j] : 0.f;
    if (layer.pool) {
      const float best = larger(values[half][0], values[half][1]);
      values[half][0] = larger(best, shfl_xor(best, 1));
    }
  }
  if (i + 1 == p.count) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t to = shfl(target, 8 * t + 4 * j);
      if (to < 0 || (layer.pool && (t % 2 != 0 || j > 0))) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (ends.there[half])
          static_cast<scalar_t*>(p.output)[to + (m * 16 + g + 8 * half) * p.output_stride[1]] =
              from_opmath<scalar_t>(values[half][j]);
    }
    sync_warp();
    return;
  }
  // Turned in the warp's scratch, so that 16 bytes of a pixel go to a block at once.
  scalar_t* const turned = reinterpret_cast<scalar_t*>(at.scratch(warp));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (layer.pool && (j > 0 || t % 2 != 0)) continue;
      const int pixel = layer.pool ? t / 2 : 2 * t + j;
      turned[pixel * 16 + g + 8 * half] = from_opmath<scalar_t>(values[half][j]);
    }
  }
  sync_warp();
  constexpr int kVectors = int(sizeof(scalar_t));  // of 16 bytes, in 16 channels
  constexpr int kEach = 16 / kVectors;
  const int shift = layer.pool ? 1 : 3;  // 2 or 8 pixels
#pragma unroll 1
  for (int first = 0; first < at.blocks * kVectors << shift; first += kWarpSize) {
    const int copy = first + lane, vector = copy % kVectors, pixel = copy / kVectors & ((1 << shift) - 1);
    const int to = shfl(int(target), pixel << (5 - shift)), block = copy / kVectors >> shift;
    if (block >= at.blocks || to < 0) continue;
    scalar_t* const mine = at.map(p, i + 1) + to + m * 16 + vector * kEach;
    *reinterpret_cast<uint4*>(at.in_block(mine, block)) =
        *reinterpret_cast<const uint4*>(turned + pixel * 16 + vector * kEach);
  }
  sync_warp();
}

// Tiles of layer i; `splits` warps share the sum of one, which they add in order.
template <typename Product, int MT, int NT, typename scalar_t, bool CLUSTER>
PVK_DEVICE void run_tiles(const ChainParams& p, const Place<scalar_t, CLUSTER>& at, int i) {
  constexpr bool kSplits = MT * NT == 1, kEarlyEnds = kSplits && sizeof(scalar_t) == 2;
  const ChainLayer& layer = p.layers[i];
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int all = at.images * layer.pixels(), k_tiles = layer.k_tiles(), m_tiles = layer.m_tiles();
  const int columns = ceil_div(all, 8 * NT), items = ceil_div(m_tiles, MT) * columns;
  const int splits = kSplits ? layer.splits : 1, split = kSplits ? warp % splits : 0;
  const int step = at.blocks * (kWarps / splits);
  // The warps of a block share barriers: all make the same number of rounds.
  for (int round = 0; round * step < items; ++round) {
    const int item = round * step + warp / splits * at.blocks + at.rank;
    const bool works = item < items;
    const int m = item / columns * MT, column = item % columns * NT * 8;
    MmaC sums[MT][NT] = {};
    Ends<scalar_t> ends[MT];
    const auto load_ends = [&] {
#pragma unroll
      for (int j = 0; j < MT; ++j) ends[j].load(layer, (m + j) * 16 + lane / 4);
    };
    if (works) {
      if constexpr (kEarlyEnds) load_ends();  // beside the weights; others have no registers left
      Factors<scalar_t, MT, NT> f;
#pragma unroll
      for (int j = 0; j < MT; ++j)
        f.weight[j] = static_cast<const scalar_t*>(layer.packed) + int64_t(min_of(m + j, m_tiles - 1)) * k_tiles * 256;
      f.map = at.map(p, i);
      f.table = at.table() + layer.table;
#pragma unroll
      for (int j = 0; j < NT; ++j)
        f.source[j] = Column(layer, min_of(column + j * 8 + lane / 4, all - 1)).source(layer);
      f.begin = int(int64_t(k_tiles) * split / splits);
      f.end = int(int64_t(k_tiles) * (split + 1) / splits);
      Product::add(sums, f, lane);
    }
    if (kSplits && splits > 1) {
      const auto part = [&](int of) { return reinterpret_cast<float4*>(at.scratch(of)) + lane; };
      float (&mine)[4] = sums[0][0].values;
      if (works && split > 0) *part(warp) = make_float4(mine[0], mine[1], mine[2], mine[3]);
      __syncthreads();
      for (int other = 1; other < splits && works && split == 0; ++other) {
        const float4 more = *part(warp + other);
        mine[0] += more.x;
        mine[1] += more.y;
        mine[2] += more.z;
        mine[3] += more.w;
      }
    }
    if (works && split == 0) {
      if constexpr (!kEarlyEnds) load_ends();
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int64_t target = target_of(p, at, i, column + n * 8 + lane / 4);
#pragma unroll
        for (int j = 0; j < MT; ++j)
          if (m + j < m_tiles) store_tile(p, at, i, sums[j][n], m + j, target, ends[j], warp, lane);
      }
    }
    if (kSplits && splits > 1) __syncthreads();
  }
}

template <typename Product, typename scalar_t, bool CLUSTER>
PVK_DEVICE void run_layer(const ChainParams& p, const Place<scalar_t, CLUSTER>& at, int i) {
  switch (p.layers[i].tile) {
    case kSplit:
      return run_tiles<Product, 1, 1>(p, at, i);
    case kTwo:
      return run_tiles<Product, 1, 2>(p, at, i);
    case kEight:
      if constexpr (sizeof(scalar_t) == 2) run_tiles<Product, 2, 4>(p, at, i);
  }
}

}  // namespace pvk::graph
