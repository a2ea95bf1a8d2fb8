// RoI align on CUDA: which kernel serves which layout, and how a launch is cut. The kernels are in
// forward_channels.cuh, forward_pixels.cuh and backward.cuh.
#include <stdexcept>
#include <string>

#include "core/dispatch.cuh"
#include "core/launch.h"
#include "ops/roi_align/backward.cuh"
#include "ops/roi_align/forward_channels.cuh"
#include "ops/roi_align/forward_pixels.cuh"
#include "ops/roi_align/roi.cuh"
#include "ops/roi_align/roi_align.h"

namespace pvk::roi_align {
namespace {

constexpr int64_t kMaxGridX = 2147483647, kMaxGridYZ = 65535;
constexpr int64_t kEnoughBlocks = 1024;  // about what fills the largest GPU once; smaller problems are cut finer

// Boxes, pixels and bins are counted in 32 bits, offsets in 64.
void check_sizes(const RoiAlignParams& p) {
  const auto check = [](int64_t value, const char* what) {
    if (value < kMaxGridX) return;
    throw std::runtime_error("roi_align: expected " + std::string(what) + " to be below 2147483647, but got " +
                             std::to_string(value));
  };
  check(p.K, "the number of boxes");
  for (int l = 0; l < p.num_levels; ++l) {
    check(p.levels[l].H, "the height of input");
    check(p.levels[l].W, "the width of input");
  }
  check(p.PH, "the height of output_size");
  check(p.PW, "the width of output_size");
  check(p.PH * p.PW, "the bins of output_size");
}

// Whether channels can be read or written as 16-byte vectors.
template <typename scalar_t>
bool allows_vectors(const void* data, const int64_t (&stride)[4], int64_t channels) {
  constexpr int64_t kVec = kVec16<scalar_t>;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[1] == 1 && channels % kVec == 0 &&
         stride[0] % kVec == 0 && stride[2] % kVec == 0 && stride[3] % kVec == 0;
}

// Whether all maps satisfy a condition.
template <typename Condition>
bool all_levels(const RoiAlignParams& p, const Condition& condition) {
  for (int l = 0; l < p.num_levels; ++l)
    if (!condition(p.levels[l])) return false;
  return true;
}

template <typename scalar_t>
bool maps_allow_vectors(const RoiAlignParams& p) {
  return all_levels(p, [&](const Level& level) { return allows_vectors<scalar_t>(level.map, level.stride, p.C); });
}

// Channels are cut in whole passes, bins in whole warps, only as far as there are too few RoIs.
LaunchConfig cut_forward(const RoiAlignParams& p, int64_t pass_channels, int64_t warp_items, Stream stream,
                         ForwardPlan& plan) {
  const int64_t passes = ceil_div(p.C, pass_channels);
  const int64_t chunks = min_of(min_of(passes, kMaxGridYZ), ceil_div(kEnoughBlocks, p.K));
  plan.channels = ceil_div(passes, chunks) * pass_channels;
  const int64_t grid_y = ceil_div(p.C, plan.channels);
  const int64_t grid_z =
      max_of(int64_t(1), min_of(ceil_div(kEnoughBlocks, p.K * grid_y), ceil_div(warp_items, int64_t(kWarps))));
  return {dim3(unsigned(p.K), unsigned(grid_y), unsigned(grid_z)), dim3(kBlockThreads), 0, stream};
}

template <typename scalar_t, int VEC, int VECS>
void forward_channels(const RoiAlignParams& p, Stream stream) {
  ForwardPlan plan;
  plan.vector_store = VEC > 1 && allows_vectors<scalar_t>(p.pooled, p.pooled_stride, p.C);
  const LaunchConfig config = cut_forward(p, kWarpSize * VEC * VECS, p.PH * p.PW, stream, plan);
  launch(roi_align_forward_channels_kernel<scalar_t, VEC, VECS>, config, p, plan);
}

template <typename scalar_t>
void forward_pixels(const RoiAlignParams& p, Stream stream) {
  ForwardPlan plan;
  plan.vector_store = false;
  // A block's work items, (slices of channels) x (at most PH * PW groups of bins), are counted in 32 bits.
  const int64_t slices = max_of(int64_t(1), min_of(int64_t(8), kMaxGridX / (p.PH * p.PW)));
  const int64_t pass_channels =
      p.K * ceil_div(p.C, slices * kSliceChannels) < kEnoughBlocks ? kSliceChannels : slices * kSliceChannels;
  const LaunchConfig config = cut_forward(p, pass_channels, p.PH * p.PW, stream, plan);
  launch(roi_align_forward_pixels_kernel<scalar_t>, config, p, plan);
}

int64_t count_tiles(const RoiAlignParams& p, int64_t rows, int64_t columns, int64_t channels,
                    BackwardPlan* plan = nullptr) {
  int64_t tiles = 0;
  for (int l = 0; l < p.num_levels; ++l) {
    if (plan != nullptr) plan->first_tile[l] = uint32_t(tiles);
    tiles += p.N * ceil_div(p.levels[l].H, rows) * ceil_div(p.levels[l].W, columns) * ceil_div(p.C, channels);
  }
  return tiles;
}

// One block a tile.
LaunchConfig cut_backward(const RoiAlignParams& p, int64_t rows, int64_t columns, int64_t channels, Stream stream,
                          BackwardPlan& plan) {
  const int64_t tiles = count_tiles(p, rows, columns, channels, &plan);
  if (tiles > kMaxGridX) {
    throw std::runtime_error("roi_align: expected input to have at most 2147483647 tiles, but got " +
                             std::to_string(tiles));
  }
  return {dim3(unsigned(tiles)), dim3(kBlockThreads), 0, stream};
}

template <typename scalar_t, int VEC, int COLUMNS>
void backward_channels(const RoiAlignParams& p, Stream stream) {
  BackwardPlan plan;
  plan.vector_store = VEC > 1 && maps_allow_vectors<scalar_t>(p);
  const LaunchConfig config = cut_backward(p, kWarps, COLUMNS, kWarpSize * VEC, stream, plan);
  launch(roi_align_backward_channels_kernel<scalar_t, VEC, COLUMNS>, config, p, plan);
}

template <typename scalar_t, int CHANNELS>
void backward_pixels(const RoiAlignParams& p, Stream stream) {
  BackwardPlan plan;
  plan.vector_store = false;
  const LaunchConfig config = cut_backward(p, 16, 16, CHANNELS, stream, plan);
  launch(roi_align_backward_pixels_kernel<scalar_t, CHANNELS>, config, p, plan);
}

}  // namespace

void forward(const RoiAlignParams& p, Stream stream) {
  if (p.K == 0 || p.C == 0 || p.PH == 0 || p.PW == 0) return;
  check_sizes(p);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kVec = kVec16<scalar_t>;
    const bool channels_adjoin = all_levels(p, [](const Level& level) { return level.stride[1] == 1; });
    if (!channels_adjoin || p.C == 1) return forward_pixels<scalar_t>(p, stream);
    if (!maps_allow_vectors<scalar_t>(p)) return forward_channels<scalar_t, 1, 2>(p, stream);
    if (kVec == 8 || p.C <= kWarpSize * kVec) return forward_channels<scalar_t, kVec, 1>(p, stream);
    if constexpr (kVec < 8) forward_channels<scalar_t, kVec, 2>(p, stream);
  });
}

// The kernel follows the layout of what is read: a pixel is written once, but a bin read by several pixels.
void backward(const RoiAlignParams& p, Stream stream) {
  if (p.C == 0 || count_tiles(p, 1, 1, 1) == 0) return;
  check_sizes(p);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kVec = kVec16<scalar_t>;
    constexpr int kColumns = kVec == 8 ? 4 : 8;
    if (p.pooled_stride[1] != 1 || p.C == 1) {
      if (count_tiles(p, 16, 16, 32) < kEnoughBlocks / 2) return backward_pixels<scalar_t, 8>(p, stream);
      return backward_pixels<scalar_t, 32>(p, stream);
    }
    if (!allows_vectors<scalar_t>(p.pooled, p.pooled_stride, p.C)) return backward_channels<scalar_t, 1, 8>(p, stream);
    if (count_tiles(p, kWarps, kColumns, kWarpSize * kVec) < kEnoughBlocks / 2)
      return backward_channels<scalar_t, kVec, 2>(p, stream);
    backward_channels<scalar_t, kVec, kColumns>(p, stream);
  });
}

}  // namespace pvk::roi_align
