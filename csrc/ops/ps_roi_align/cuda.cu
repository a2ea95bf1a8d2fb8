// Position-sensitive RoI align and pool on CUDA: how a launch is cut. The kernels are in forward.cuh and backward.cuh.
#include <stdexcept>
#include <string>

#include "core/dispatch.cuh"
#include "core/launch.h"
#include "ops/ps_roi_align/backward.cuh"
#include "ops/ps_roi_align/forward.cuh"
#include "ops/ps_roi_align/ps_roi_align.h"

namespace pvk::ps_roi_align {
namespace {

constexpr int64_t kMaxGridX = 2147483647, kMaxGridY = 65535;
constexpr int64_t kEnoughBlocks = 1024;  // about what fills the largest GPU once; smaller problems are cut finer

void check_size(int64_t value, int64_t limit, const char* what) {
  if (value < limit) return;
  throw std::runtime_error("ps_roi_align: expected " + std::string(what) + " to be below " + std::to_string(limit) +
                           ", but got " + std::to_string(value));
}

// Boxes, planes and blocks are counted in 32 bits, offsets in 64.
void check_sizes(const PsRoiParams& p) {
  check_size(p.K, kMaxGridX, "the number of boxes");
  check_size(p.PH + p.PW, kMaxGridX, "the sides of output_size");
  check_size(p.C * p.PH * p.PW, kMaxGridX - (1 << 25), "the channels of input");  // indices go past by a block or two
}

template <typename scalar_t, int CHANNELS>
void launch_backward(const PsRoiParams& p, int64_t tiles, Stream stream) {
  const int64_t blocks = tiles * ceil_div(p.C, int64_t(CHANNELS));
  check_size(blocks, kMaxGridX, "the tiles of input");
  launch(ps_roi_align_backward_kernel<scalar_t, CHANNELS>, {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream}, p);
}

}  // namespace

void forward(const PsRoiParams& p, Stream stream) {
  const int64_t planes = p.C * p.PH * p.PW;
  if (p.K == 0 || planes == 0) return;
  check_sizes(p);
  const int64_t passes = ceil_div(planes, int64_t(kBlockThreads));
  const int64_t chunks = min_of(min_of(passes, kMaxGridY), ceil_div(kEnoughBlocks, p.K));
  const int64_t chunk = ceil_div(passes, chunks) * kBlockThreads;
  const dim3 grid(unsigned(p.K), unsigned(ceil_div(planes, chunk)));
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    launch(ps_roi_align_forward_kernel<scalar_t>, {grid, dim3(kBlockThreads), 0, stream}, p, int(chunk));
  });
}

void backward(const PsRoiParams& p, Stream stream) {
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0) return;
  check_sizes(p);
  const int64_t tiles = p.N * p.PH * p.PW * ceil_div(p.H, int64_t(kSide)) * ceil_div(p.W, int64_t(kSide));
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    if (p.C <= 8 || tiles * ceil_div(p.C, int64_t(32)) < kEnoughBlocks) {
      launch_backward<scalar_t, 8>(p, tiles, stream);
    } else {
      launch_backward<scalar_t, 32>(p, tiles, stream);
    }
  });
}

}  // namespace pvk::ps_roi_align
