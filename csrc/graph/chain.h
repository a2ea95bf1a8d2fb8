// A graph that is a chain of convolutions and linear layers, in one launch on CUDA: parameters, where its maps lie in
// shared memory, and the backend interface.
//
// A linear layer is a convolution: its taps are the pixels of the map that was flattened. K channels out of C, R x S
// taps. Then, in this order and all optional: + bias, * scale, + shift, activation, 2 x 2 max pooling; the result is
// rounded to the dtype, as between layers that run one by one.
#pragma once

#include "core/activation.h"
#include "core/math.h"
#include "core/types.h"

namespace pvk::graph {

constexpr int kMostLayers = 16;
constexpr int64_t kMostTaps = 1 << 10, kMostSize = 1 << 20;  // R and S; everything else
constexpr int64_t kChainScratchBytes = 8192;                 // what warps keep between barriers

// A layer, and the map that it reads: [images][rows][columns][pitch], whose border is the zero padding.
struct ChainLayer {
  const void* packed;  // as pyvision_kernels/convert/chain.py packs the weight
  const void* bias;    // [K] or null
  const void* scale;   // [K] or null
  const void* shift;   // [K] or null
  DType bias_dtype, scale_dtype;
  Activation activation;
  bool pool;
  bool tf32;                                   // float32 on tensor cores, whose products have 10-bit fractions
  int32_t C, H, W;                             // of the input
  int32_t K, R, S, OH, OW;                     // OH and OW before pooling
  int32_t stride[2], dilation[2], padding[2];  // of rows, of columns; above and to the left
  int32_t rows, columns, pitch, image;         // of the input's map; `image` elements from image to image
  int32_t table;                               // first of the entries that say where a group of 4 factors lies
  int32_t tile;                                // which of the kernel's tiles, and how many warps share the sum of one
  int32_t splits;

  // Sums run over taps, and over channels in groups of 4; 16 factors are a tile of k, 16 channels out one of m.
  PVK_HOST_DEVICE int channel_groups() const { return ceil_div(C, 4); }
  PVK_HOST_DEVICE int k_tiles() const { return ceil_div(R * S * channel_groups(), 4); }
  PVK_HOST_DEVICE int m_tiles() const { return ceil_div(K, 16); }
  PVK_HOST_DEVICE int rows_out() const { return pool ? OH / 2 : OH; }
  PVK_HOST_DEVICE int columns_out() const { return pool ? OW / 2 : OW; }
  // Columns of the product that an image has: pixels, or four for a window.
  PVK_HOST_DEVICE int pixels() const { return rows_out() * columns_out() * (pool ? 4 : 1); }
  int64_t packed_bytes(int64_t element_size) const {
    return ceil_div(int64_t(R) * S * channel_groups(), int64_t(4)) * m_tiles() * 256 * element_size;
  }
};

struct ChainParams {
  const void* input;     // [N, C, H, W], any strides
  void* output;          // [N, K, rows_out(), columns_out()] of the last layer
  DType dtype;           // float32, float16 or bfloat16; of the input, the maps and the output
  int32_t count;         // of layers, at least 1
  int32_t images;        // that a block, or a cluster of blocks, takes
  int32_t map_begin[2];  // bytes; the input of layer i is in map i % 2
  int64_t N;
  int64_t input_stride[4], output_stride[4];
  ChainLayer layers[kMostLayers];
};

inline int64_t element_size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

constexpr int64_t kTooMuch = int64_t(1) << 40;

// Places the maps of `images` images; how many bytes of shared memory that takes.
inline int64_t place(ChainParams& p, int64_t images) {
  int64_t table = 0, largest[2] = {0, 0};
  for (int i = 0; i < p.count; ++i) {
    ChainLayer& layer = p.layers[i];
    const auto extent = [&](int axis, int64_t size, int64_t out, int64_t taps) {
      const int64_t read = (out - 1) * layer.stride[axis] + (taps - 1) * layer.dilation[axis] + 1;
      return max_of(read, layer.padding[axis] + size);
    };
    // Of consecutive pixels, and of consecutive images, a warp reads groups of 4 channels from different banks.
    const int64_t channels = ceil_div(int64_t(layer.C), int64_t(16)) * 16;
    const int64_t pitch = i == 0 && layer.C < 16 ? int64_t(layer.channel_groups()) * 4 : channels | 16;
    const int64_t rows = extent(0, layer.H, layer.OH, layer.R), columns = extent(1, layer.W, layer.OW, layer.S);
    const int64_t most = int64_t(1) << 24;
    if (rows > most || columns > most || rows * columns > most) return kTooMuch;
    const int64_t image = ceil_div(rows * columns * pitch, int64_t(16)) * 16 | 16;
    if (image > most) return kTooMuch;
    layer.rows = int32_t(rows);
    layer.columns = int32_t(columns);
    layer.pitch = int32_t(pitch);
    layer.image = int32_t(image);
    layer.table = int32_t(table);
    table += int64_t(layer.k_tiles()) * 4;
    largest[i % 2] = max_of(largest[i % 2], image);
  }
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, int64_t(16)) * 16; };
  const int64_t element_size = element_size_of(p.dtype);
  const int64_t first = kChainScratchBytes + aligned(table * 4);
  const int64_t second = first + aligned(largest[0] * element_size * images);
  p.images = int32_t(images);
  const int64_t bytes = second + aligned(largest[1] * element_size * images);
  if (bytes >= int64_t(1) << 31) return kTooMuch;
  p.map_begin[0] = int32_t(first);
  p.map_begin[1] = int32_t(second);
  return bytes;
}

// Backend interface. All fields but those that place() sets, tile and splits are filled in. The first: whether the maps
// of an image fit into shared memory.
bool chain_fits(ChainParams& params);
void run_chain(ChainParams& params, Stream stream);

}  // namespace pvk::graph
