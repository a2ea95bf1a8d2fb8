// conv2d on the CPU: picks the algorithm, and brings maps into the layout that it wants.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/transpose.h"
#include "ops/conv2d/cpu_kernels.h"

namespace pvk::conv2d {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

struct MapSize {
  int64_t N, C, H, W;
};

constexpr int64_t kTilePixels = 64;
constexpr int64_t kTileChannels = 64;

// Calls body(n, first channel, channels, first row, row of the first pixel, pixels) for tiles of rows of a map.
template <typename Body>
void for_each_tile(const MapSize& size, const Body& body) {
  const int64_t blocks_c = ceil_div(size.C, kTileChannels), blocks_w = ceil_div(size.W, kTilePixels);
  const int64_t rows = size.N * size.H;
  const int64_t a_row = blocks_c * blocks_w;
  parallel_for(rows * a_row, max_of(int64_t(1), int64_t(16)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / a_row, c = i % a_row / blocks_w * kTileChannels, w = i % blocks_w * kTilePixels;
      body(row / size.H, c, min_of(kTileChannels, size.C - c), row % size.H, w, min_of(kTilePixels, size.W - w));
    }
  });
}

// to[n][h][w][c] = from[n][c][h][w], of any strides.
template <typename scalar_t>
void to_channels_last(const MapSize& size, const scalar_t* from, const int64_t* stride, scalar_t* to) {
  using T = opmath_t<scalar_t>;
  for_each_tile(size, [&](int64_t n, int64_t c, int64_t channels, int64_t h, int64_t w, int64_t pixels) {
    alignas(64) T tile[kTilePixels * kTileChannels];
    const scalar_t* source = from + n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
    scalar_t* target = to + ((n * size.H + h) * size.W + w) * size.C + c;
    load_tile(tile, kTileChannels, source, stride[1], stride[3], channels, pixels);
    store_tile(target, tile, kTileChannels, 1, size.C, channels, pixels);
  });
}

template <typename scalar_t>
void from_channels_last(const MapSize& size, const scalar_t* from, const int64_t* stride, scalar_t* to) {
  using T = opmath_t<scalar_t>;
  for_each_tile(size, [&](int64_t n, int64_t c, int64_t channels, int64_t h, int64_t w, int64_t pixels) {
    alignas(64) T tile[kTilePixels * kTileChannels];
    const scalar_t* source = from + ((n * size.H + h) * size.W + w) * size.C + c;
    scalar_t* target = to + n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
    load_tile(tile, kTileChannels, source, 1, size.C, channels, pixels);
    store_tile(target, tile, kTileChannels, stride[1], stride[3], channels, pixels);
  });
}

void set_channels_last(int64_t* stride, const MapSize& size) {
  stride[0] = size.H * size.W * size.C;
  stride[1] = 1;
  stride[2] = size.W * size.C;
  stride[3] = size.C;
}

// Runs `algorithm`, which takes channels_last maps only, on maps of any layout.
template <typename Algorithm>
void in_channels_last(const Conv2dParams& p, const Algorithm& algorithm) {
  const MapSize in{p.N, p.C, p.H, p.W};
  const MapSize out{p.N, p.K, p.pool ? p.OH / 2 : p.OH, p.pool ? p.OW / 2 : p.OW};
  const bool input_fits = p.input_stride[1] == 1 || p.C == 1;
  const bool output_fits = p.output_stride[1] == 1 || p.K == 1;
  if (input_fits && output_fits) return algorithm(p);
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    Conv2dParams inner = p;
    Buffer<scalar_t> input, output;
    if (!input_fits) {
      input.reserve(in.N * in.C * in.H * in.W);
      to_channels_last(in, static_cast<const scalar_t*>(p.input), p.input_stride, input.data());
      inner.input = input.data();
      set_channels_last(inner.input_stride, in);
    }
    if (!output_fits) {
      output.reserve(out.N * out.C * out.H * out.W);
      inner.output = output.data();
      set_channels_last(inner.output_stride, out);
    }
    algorithm(inner);
    if (!output_fits) from_channels_last(out, output.data(), p.output_stride, static_cast<scalar_t*>(p.output));
  });
}

}  // namespace

void forward(const Conv2dParams& p) {
  switch (p.algorithm) {
    case Algorithm::kDirect:
      return in_channels_last(p, forward_direct);
    case Algorithm::kWinograd2:
    case Algorithm::kWinograd4:
      return in_channels_last(p, forward_winograd);
    case Algorithm::kDepthwise:
      return forward_depthwise(p);
    case Algorithm::kFewChannels:
      return forward_few_channels(p);
  }
}

int64_t packed_bytes(const Conv2dParams& p) {
  switch (p.algorithm) {
    case Algorithm::kDirect:
      return packed_bytes_direct(p);
    case Algorithm::kWinograd2:
    case Algorithm::kWinograd4:
      return packed_bytes_winograd(p);
    case Algorithm::kDepthwise:
      return packed_bytes_depthwise(p);
    case Algorithm::kFewChannels:
      return packed_bytes_few_channels(p);
  }
  return 0;
}

void pack(const PackParams& p) {
  switch (p.algorithm) {
    case Algorithm::kDirect:
      return pack_direct(p);
    case Algorithm::kWinograd2:
    case Algorithm::kWinograd4:
      return pack_winograd(p);
    case Algorithm::kDepthwise:
      return pack_depthwise(p);
    case Algorithm::kFewChannels:
      return pack_few_channels(p);
  }
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, Conv2dParams)
PVK_CPU_ENTRY(int64_t, packed_bytes, Conv2dParams)
PVK_CPU_ENTRY(void, pack, PackParams)

}  // namespace pvk::conv2d
