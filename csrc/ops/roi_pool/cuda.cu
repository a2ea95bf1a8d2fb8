// RoI max pooling on CUDA: which kernel serves which layout, and how a launch is cut. The kernels are in forward.cuh
// and backward.cuh.
#include <stdexcept>
#include <string>

#include "core/dispatch.cuh"
#include "core/launch.h"
#include "ops/roi_pool/backward.cuh"
#include "ops/roi_pool/forward.cuh"
#include "ops/roi_pool/roi_pool.h"

namespace pvk::roi_pool {
namespace {

constexpr int64_t kMaxGridX = 2147483647, kMaxGridYZ = 65535;
constexpr int64_t kEnoughBlocks = 1024;  // about what fills the largest GPU once; smaller problems are cut finer

void check_size(int64_t value, const char* what) {
  if (value < kMaxGridX) return;
  throw std::runtime_error("roi_pool: expected " + std::string(what) + " to be below 2147483647, but got " +
                           std::to_string(value));
}

// Whether channels can be read or written as 16-byte vectors.
template <typename scalar_t>
bool allows_vectors(const void* data, const int64_t (&stride)[4], int64_t channels) {
  constexpr int64_t kVec = kVec16<scalar_t>;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[1] == 1 && channels % kVec == 0 &&
         stride[0] % kVec == 0 && stride[2] % kVec == 0 && stride[3] % kVec == 0;
}

template <typename scalar_t, int VEC>
void forward_channels(const RoiPoolParams& p, Stream stream) {
  constexpr int64_t kPass = kWarpSize * VEC;
  const int64_t passes = ceil_div(p.C, kPass);
  const int64_t chunks = min_of(min_of(passes, kMaxGridYZ), ceil_div(kEnoughBlocks, p.K));
  const int64_t channels = ceil_div(passes, chunks) * kPass, grid_y = ceil_div(p.C, channels);
  const int64_t grid_z =
      max_of(int64_t(1), min_of(ceil_div(kEnoughBlocks, p.K * grid_y), ceil_div(p.PH * p.PW, int64_t(kWarps))));
  const bool vector_store = VEC % 4 == 0 && allows_vectors<scalar_t>(p.pooled, p.pooled_stride, p.C);
  launch(roi_pool_forward_channels_kernel<scalar_t, VEC>,
         {dim3(unsigned(p.K), unsigned(grid_y), unsigned(grid_z)), dim3(kBlockThreads), 0, stream}, p, channels,
         vector_store);
}

template <typename scalar_t>
void forward_pixels(const RoiPoolParams& p, Stream stream) {
  constexpr int kChannels = sizeof(scalar_t) == 8 ? 4 : 8;
  const int64_t groups = ceil_div(p.C, int64_t(kChannels)), bins = p.PH * p.PW;
  // A block has a bin for each thread, and more only where there are enough blocks. Its items are counted in 32 bits.
  const int64_t least = ceil_div(int64_t(kBlockThreads), bins);
  const int64_t wanted = max_of(least, ceil_div(groups * p.K, 8 * kEnoughBlocks));
  const int64_t in_block = max_of(int64_t(1), min_of(min_of(wanted, groups), kMaxGridX / bins));
  const int64_t grid_y = min_of(ceil_div(groups, in_block), kMaxGridYZ);
  launch(roi_pool_forward_pixels_kernel<scalar_t, kChannels>,
         {dim3(unsigned(p.K), unsigned(grid_y)), dim3(kBlockThreads), 0, stream}, p, in_block);
}

int64_t count_tiles(const RoiPoolParams& p, int64_t rows, int64_t columns) {
  return p.N * ceil_div(p.H, rows) * ceil_div(p.W, columns) * ceil_div(p.C, int64_t(kWarpSize));
}

template <typename scalar_t, int ROWS, int COLUMNS>
void backward_tiles(const RoiPoolParams& p, Stream stream) {
  const int64_t tiles = count_tiles(p, ROWS, COLUMNS), blocks = ceil_div(tiles, int64_t(kBackwardWarps));
  check_size(blocks, "the number of tiles of input");
  launch(roi_pool_backward_kernel<scalar_t, ROWS, COLUMNS>, {dim3(unsigned(blocks)), dim3(kBackwardThreads), 0, stream},
         p, tiles);
}

}  // namespace

void forward(const RoiPoolParams& p, Stream stream) {
  if (p.K == 0 || p.C == 0 || p.PH == 0 || p.PW == 0) return;
  check_size(p.K, "the number of boxes");
  check_size(p.PH, "the height of output_size");
  check_size(p.PW, "the width of output_size");
  check_size(p.PH * p.PW, "the bins of output_size");
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kVec = kVec16<scalar_t>;
    if (p.map_stride[1] != 1 || p.C == 1) return forward_pixels<scalar_t>(p, stream);
    if (allows_vectors<scalar_t>(p.map, p.map_stride, p.C)) return forward_channels<scalar_t, kVec>(p, stream);
    forward_channels<scalar_t, 1>(p, stream);
  });
}

void backward(const RoiPoolParams& p, Stream stream) {
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0) return;
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kRows = sizeof(scalar_t) == 8 ? 4 : 8;
    if (count_tiles(p, kRows, 8) < 4 * kEnoughBlocks) return backward_tiles<scalar_t, 4, 4>(p, stream);
    backward_tiles<scalar_t, kRows, 8>(p, stream);
  });
}

}  // namespace pvk::roi_pool
