// How a block brings the gathered operand of a GatherGemm into shared memory, a step of 64 bytes along the reduction at
// a time: by vectors along the channels that lie side by side, or element by element from any strides.
#pragma once

#include "core/async.cuh"
#include "ops/conv2d/gather_gemm.h"

namespace pvk::conv2d {

// What a block knows of its part of the product.
struct GatherBlock {
  AxisPhase axes[2];
  int64_t phase[2];
  int64_t rows;   // of the phase: images * pixels
  int64_t depth;  // of the phase
  int64_t row0;   // the block's first
  int64_t group, phase_class;
};

struct Pixel {
  int64_t image, h, w;  // in the phase
};

// With pooling, four rows that follow each other are a window.
PVK_DEVICE Pixel pixel_of(const GatherBlock& block, bool pool, int64_t row) {
  const int64_t width = pool ? block.axes[1].pixels / 2 : block.axes[1].pixels;
  const int64_t height = pool ? block.axes[0].pixels / 2 : block.axes[0].pixels;
  const int64_t i = pool ? row / 4 : row, line = i / width, image = line / height;
  const int64_t h = line - image * height, w = i - line * width;
  if (!pool) return {image, h, w};
  return {image, 2 * h + row % 4 / 2, 2 * w + row % 2};
}

// The source has its channels side by side, in whole vectors; coordinates are below 2^30. A thread owns a vector of
// each of a few rows; copies run by cp.async.
template <typename Operand, typename scalar_t, int ROWS, int THREADS>
struct VectorGather {
  static constexpr bool kStaged = false;  // nothing waits in registers
  static constexpr int kVec = kVec16<scalar_t>, kDepth = 4 * kVec, kCount = ROWS * 4 / THREADS;
  static constexpr int kTableBytes = 0;
  static_assert(ROWS * 4 % THREADS == 0);

  const scalar_t* base[kCount];
  int h[kCount], w[kCount];
  int channel, r, s, tap_h, tap_w;
  int64_t tap;  // offset

  PVK_DEVICE void begin(const GatherGemm& p, const GatherBlock& block, unsigned char*, int64_t step) {
    const int row = int(threadIdx.x) / 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t m = block.row0 + row + i * (THREADS / 4);
      const Pixel at = pixel_of(block, p.pool, min_of(m, block.rows - 1));
      const int64_t y = at.h * block.axes[0].step + block.axes[0].origin;
      const int64_t x = at.w * block.axes[1].step + block.axes[1].origin;
      h[i] = m < block.rows ? int(y) : -(1 << 30);  // beyond every tap
      w[i] = int(x);
      base[i] = static_cast<const scalar_t*>(p.source) + at.image * p.source_stride[0] + block.group * p.channels +
                y * p.source_stride[2] + x * p.source_stride[3];
    }
    const int64_t k = step * kDepth + int(threadIdx.x) % 4 * kVec, index = p.channels > 0 ? k / p.channels : 0;
    channel = int(k - index * p.channels);
    r = int(index / max_of(block.axes[1].taps, int64_t(1)));
    s = int(index - r * block.axes[1].taps);
    set_tap(p, block);
  }

  PVK_DEVICE void set_tap(const GatherGemm& p, const GatherBlock& block) {
    tap_h = r * int(block.axes[0].tap);
    tap_w = s * int(block.axes[1].tap);
    tap = tap_h * p.source_stride[2] + tap_w * p.source_stride[3];
  }

  // Starts the copies of the next step.
  PVK_DEVICE void load(const GatherGemm& p, const GatherBlock& block, scalar_t* stage, const unsigned char*, int) {
    const int row = int(threadIdx.x) / 4, k = int(threadIdx.x) % 4 * kVec;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool inside = r < int(block.axes[0].taps) && unsigned(h[i] + tap_h) < unsigned(p.axes[0].source) &&
                          unsigned(w[i] + tap_w) < unsigned(p.axes[1].source);
      const scalar_t* const from = inside ? base[i] + tap + channel : static_cast<const scalar_t*>(p.source);
      cp_async<16>(stage + Operand::at(row + i * (THREADS / 4), k), from, inside ? 16u : 0u);
    }
    channel += kDepth;
    if (channel < int(p.channels)) return;
    do {
      channel -= int(p.channels);
      if (++s == int(block.axes[1].taps)) {
        s = 0;
        ++r;
      }
    } while (channel >= int(p.channels));
    set_tap(p, block);
  }

  PVK_DEVICE void store(scalar_t*) const {}
  PVK_DEVICE void tabulate(const GatherGemm&, const GatherBlock&, unsigned char*, int64_t, int) const {}
};

// Where the elements of a step along the reduction are.
struct GatherTap {
  int64_t channel;  // offset; -1 beyond the reduction
  int64_t h, w;
};

// Any strides, paddings and numbers of channels. Neighbouring threads own neighbouring rows, so that maps are read
// along W; a thread owns some steps of the reduction in its row, which a table in shared memory describes. Elements
// wait in registers while the step before them is multiplied.
template <typename Operand, typename scalar_t, int ROWS, int THREADS>
struct ElementGather {
  static constexpr bool kStaged = true;
  static constexpr int kVec = kVec16<scalar_t>, kDepth = 4 * kVec, kParts = THREADS / ROWS;
  static constexpr int kCount = kDepth / kParts, kVecs = kCount / kVec;
  static constexpr int kTableBytes = 2 * kDepth * int(sizeof(GatherTap));
  static_assert(THREADS % ROWS == 0 && kCount % kVec == 0 && kDepth <= THREADS);

  int64_t image, y, x;  // offset of the image, or -1; the row's base
  VecN<scalar_t, kVec> staged[kVecs];

  PVK_DEVICE void begin(const GatherGemm& p, const GatherBlock& block, unsigned char* table, int64_t step) {
    const int64_t m = block.row0 + int(threadIdx.x) % ROWS;
    const Pixel at = pixel_of(block, p.pool, min_of(m, block.rows - 1));
    image = m < block.rows ? at.image * p.source_stride[0] + block.group * p.channels * p.source_stride[1] : -1;
    y = at.h * block.axes[0].step + block.axes[0].origin;
    x = at.w * block.axes[1].step + block.axes[1].origin;
    tabulate(p, block, table, step, 0);
    tabulate(p, block, table, step + 1, 1);
    __syncthreads();
  }

  PVK_DEVICE void tabulate(const GatherGemm& p, const GatherBlock& block, unsigned char* table, int64_t step,
                           int half) const {
    if (int(threadIdx.x) >= kDepth) return;
    GatherTap tap = {-1, 0, 0};
    const int64_t k = step * kDepth + threadIdx.x;
    if (k < block.depth) {
      const int64_t index = k / p.channels, r = index / block.axes[1].taps;
      tap.channel = (k - index * p.channels) * p.source_stride[1];
      tap.h = r * block.axes[0].tap;
      tap.w = (index - r * block.axes[1].taps) * block.axes[1].tap;
    }
    reinterpret_cast<GatherTap*>(table)[half * kDepth + threadIdx.x] = tap;
  }

  // The element's address, or null where it is zero.
  PVK_DEVICE const scalar_t* place(const GatherGemm& p, const GatherTap& tap) const {
    if (image < 0 || tap.channel < 0) return nullptr;
    const int64_t h = source_index(p.padding_mode, y + tap.h, p.axes[0].source);
    const int64_t w = source_index(p.padding_mode, x + tap.w, p.axes[1].source);
    if (h < 0 || w < 0) return nullptr;
    return static_cast<const scalar_t*>(p.source) + image + tap.channel + h * p.source_stride[2] +
           w * p.source_stride[3];
  }

  PVK_DEVICE void load(const GatherGemm& p, const GatherBlock&, scalar_t*, const unsigned char* table, int half) {
    const GatherTap* const taps =
        reinterpret_cast<const GatherTap*>(table) + half * kDepth + int(threadIdx.x) / ROWS * kCount;
    if (p.channels % kCount == 0) {  // all of one tap
      const scalar_t* const from = place(p, taps[0]);
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        staged[e / kVec].data[e % kVec] =
            from != nullptr ? __ldg(from + e * p.source_stride[1]) : from_opmath<scalar_t>(0);
      return;
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const scalar_t* const from = place(p, taps[e]);
      staged[e / kVec].data[e % kVec] = from != nullptr ? __ldg(from) : from_opmath<scalar_t>(0);
    }
  }

  PVK_DEVICE void store(scalar_t* stage) const {
    const int row = int(threadIdx.x) % ROWS, k = int(threadIdx.x) / ROWS * kCount;
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      *reinterpret_cast<VecN<scalar_t, kVec>*>(stage + Operand::at(row, k + v * kVec)) = staged[v];
  }
};

}  // namespace pvk::conv2d
