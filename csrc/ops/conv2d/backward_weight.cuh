// The gradient of conv2d with respect to its weight as a matrix product, for each group:
//
//   grad_weight[k, (r, s, c)] = sum over pixels (n, oh, ow) of grad_output[n, k, oh, ow] * input[n, c, h(oh, r), w(ow,
//   s)]
//
// so that M is K / groups, N is R * S * C / groups in the order (r, s, c), and the sum runs over the pixels of all
// images. The pixels are cut into parts, each a block's; their sums are added afterwards, in order.
#pragma once

#include "core/async.cuh"
#include "core/fma_tile.cuh"
#include "core/launch.h"
#include "core/mma_tile.cuh"
#include "ops/conv2d/conv2d.h"

namespace pvk::conv2d {

// A block's tile of the result. Of float64 there are no large ones.
constexpr int block_m(bool large) {
  return large ? 128 : 64;
}
constexpr int block_n(bool tensor_cores, bool large) {
  return large && tensor_cores ? 128 : 64;
}

// How the product is cut; the grid is one-dimensional, tiles first, so that blocks that run together share pixels.
struct WeightPlan {
  bool tensor_cores, large;
  bool vector_output, vector_input;  // channels are dense and come in 16-byte vectors: of grad_output, of the input
  int64_t M, N, pixels;
  int64_t tiles_m, tiles_n;
  int64_t parts, pixels_of_part;
};

// The kernels for channels that are not vectors: those of the input, or of both. In a file of their own.
void backward_weight_gathered(const BackwardWeightParams& params, const WeightPlan& plan, Stream stream);

// Coordinates in the input are below it, whatever the tap.
constexpr int64_t kMostCoordinate = int64_t(1) << 30;

// A pixel of the result: where its gradient and tap (0, 0) of the first channel are, from the tensors' beginnings.
struct WeightPixel {
  int64_t output;  // -1 beyond the part; h and w are then outside with every tap
  int64_t input;
  int h, w;
};

// A column of the product: what (r, s, c) adds to a pixel's place in the input, and its place in the result.
struct WeightColumn {
  int64_t input, output;
  int h, w;
};

template <typename Tile, int STAGES, int BLOCK_N>
struct alignas(16) WeightShared {
  typename Tile::Element a[STAGES][Tile::A::kElements];
  typename Tile::Element b[STAGES][Tile::B::kElements];
  WeightPixel pixels[2][Tile::kDepth];
  WeightColumn columns[BLOCK_N];
};

// Walks over the pixels of a part, kDepth at a time, without divisions on the way.
struct WeightCursor {
  int64_t pixel, n, oh, ow;

  PVK_DEVICE WeightCursor(const BackwardWeightParams& p, int64_t begin)
      : pixel(begin), n(begin / p.OW / p.OH), oh(begin / p.OW % p.OH), ow(begin % p.OW) {}

  PVK_DEVICE void advance(const BackwardWeightParams& p, const WeightCursor& by) {
    pixel += by.pixel;
    n += by.n;
    oh += by.oh;
    ow += by.ow;
    if (ow >= p.OW) {
      ow -= p.OW;
      ++oh;
    }
    if (oh >= p.OH) {
      oh -= p.OH;
      ++n;
    }
  }

  PVK_DEVICE WeightPixel get(const BackwardWeightParams& p, int64_t end) const {
    if (pixel >= end) return {-1, 0, INT32_MIN, INT32_MIN};
    const int64_t h = oh * p.stride[0] - p.padding_top, w = ow * p.stride[1] - p.padding_left;
    return {n * p.grad_output_stride[0] + oh * p.grad_output_stride[2] + ow * p.grad_output_stride[3],
            n * p.input_stride[0] + h * p.input_stride[2] + w * p.input_stride[3], int(h), int(w)};
  }
};

// A block owns a tile of one group and part. Operands are steps of kDepth pixels in a ring in shared memory. Where
// channels are dense, cp.async brings 16 bytes of them, zeros for padding; else neighbouring lanes take neighbouring
// pixels, an element at a time, through registers. Sums in float32 (float64) in the order of pixels, by tensor cores or
// fused multiply-adds. A part's tile goes to the workspace [part, K, N]; where there is one part, to the result.
template <typename Tile, int BLOCK_M, int BLOCK_N, int STAGES, bool GATHER_A, bool GATHER_B>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kThreads == 128 ? 2 : 1)
    conv2d_backward_weight_kernel(const BackwardWeightParams p, const WeightPlan plan) {
  using scalar_t = typename Tile::Element;
  using Sum = typename Tile::Sum;
  constexpr int kDepth = Tile::kDepth, kThreads = Tile::kThreads, kVec = kVec16<scalar_t>;
  static_assert(kThreads % kDepth == 0 && kThreads >= BLOCK_N);
  using Shared = WeightShared<Tile, STAGES, BLOCK_N>;
  SIMT_DYN_SHARED(Shared, shared);
  const int thread = threadIdx.x;

  int64_t block = blockIdx.x;
  const int64_t n0 = block % plan.tiles_n * BLOCK_N;
  block /= plan.tiles_n;
  const int64_t m0 = block % plan.tiles_m * BLOCK_M;
  block /= plan.tiles_m;
  const int64_t group = block % p.groups, part = block / p.groups;
  const int64_t begin = part * plan.pixels_of_part, end = min_of(begin + plan.pixels_of_part, plan.pixels);
  const int steps = int(ceil_div(end - begin, int64_t(kDepth)));
  const scalar_t* const grad_output =
      static_cast<const scalar_t*>(p.grad_output) + (group * plan.M + m0) * p.grad_output_stride[1];
  const scalar_t* const input = static_cast<const scalar_t*>(p.input);
  const int rows = int(min_of(plan.M - m0, int64_t(BLOCK_M))), columns = int(min_of(plan.N - n0, int64_t(BLOCK_N)));

  if (thread < BLOCK_N) {
    const int64_t channels = p.C / p.groups, n = n0 + thread;
    const int64_t c = n % channels, s = n / channels % p.S, r = n / channels / p.S;
    const int64_t h = r * p.dilation[0], w = s * p.dilation[1];
    const bool valid = thread < columns;
    shared->columns[thread] = {
        (group * channels + c) * p.input_stride[1] + h * p.input_stride[2] + w * p.input_stride[3],
        c * p.grad_weight_stride[1] + r * p.grad_weight_stride[2] + s * p.grad_weight_stride[3],
        valid ? int(h) : INT32_MAX, valid ? int(w) : INT32_MAX};
  }
  WeightCursor cursor(p, begin + thread % kDepth);
  const WeightCursor by(p, kDepth);
  const auto put_pixels = [&](int step) {
    if (thread < kDepth) {
      shared->pixels[step % 2][thread] = cursor.get(p, end);
      cursor.advance(p, by);
    }
  };
  put_pixels(0);
  __syncthreads();

  // Threads of a row of vectors, and the vector that this one brings of every row.
  constexpr int kVecsA = BLOCK_M / kVec, kVecsB = BLOCK_N / kVec;
  const int vec_a = thread % kVecsA * kVec, vec_b = thread % kVecsB * kVec;
  const WeightColumn mine = shared->columns[vec_b];
  const int lane_k = thread % kDepth, lane_row = thread / kDepth;
  constexpr int kRowsAtOnce = kThreads / kDepth;
  scalar_t gathered_a[GATHER_A ? BLOCK_M / kRowsAtOnce : 1], gathered_b[GATHER_B ? BLOCK_N / kRowsAtOnce : 1];

  const scalar_t zero = from_opmath<scalar_t>(opmath_t<scalar_t>(0));
  const auto is_inside = [&](const WeightPixel& pixel, const WeightColumn& column) {
    return unsigned(pixel.h) + unsigned(column.h) < unsigned(p.H) &&
           unsigned(pixel.w) + unsigned(column.w) < unsigned(p.W);
  };
  // Starts the reads of a step's operands.
  const auto start = [&](int step) {
    const WeightPixel* const pixels = shared->pixels[step % 2];
    const WeightPixel lane = pixels[lane_k];
    if constexpr (GATHER_A) {
#pragma unroll
      for (int i = 0; i < BLOCK_M / kRowsAtOnce; ++i) {
        const int row = lane_row + i * kRowsAtOnce;
        const bool valid = lane.output >= 0 && row < rows;
        gathered_a[i] = valid ? __ldg(grad_output + lane.output + row * p.grad_output_stride[1]) : zero;
      }
    } else {
      scalar_t* const a = shared->a[step % STAGES];
#pragma unroll
      for (int k = thread / kVecsA; k < kDepth; k += kThreads / kVecsA) {
        const int64_t at = pixels[k].output;
        const bool valid = at >= 0 && vec_a < rows;
        cp_async<16>(&a[Tile::A::at(vec_a, k)], valid ? grad_output + at + vec_a : grad_output, valid ? 16u : 0u);
      }
    }
    if constexpr (GATHER_B) {
#pragma unroll
      for (int i = 0; i < BLOCK_N / kRowsAtOnce; ++i) {
        const WeightColumn column = shared->columns[lane_row + i * kRowsAtOnce];
        gathered_b[i] = is_inside(lane, column) ? __ldg(input + (lane.input + column.input)) : zero;
      }
    } else {
      scalar_t* const b = shared->b[step % STAGES];
#pragma unroll
      for (int k = thread / kVecsB; k < kDepth; k += kThreads / kVecsB) {
        const bool valid = is_inside(pixels[k], mine);
        cp_async<16>(&b[Tile::B::at(vec_b, k)], valid ? input + (pixels[k].input + mine.input) : input,
                     valid ? 16u : 0u);
      }
    }
  };
  // What went through registers reaches shared memory.
  const auto finish = [&](int step) {
    if constexpr (GATHER_A) {
#pragma unroll
      for (int i = 0; i < BLOCK_M / kRowsAtOnce; ++i)
        shared->a[step % STAGES][Tile::A::at(lane_row + i * kRowsAtOnce, lane_k)] = gathered_a[i];
    }
    if constexpr (GATHER_B) {
#pragma unroll
      for (int i = 0; i < BLOCK_N / kRowsAtOnce; ++i)
        shared->b[step % STAGES][Tile::B::at(lane_row + i * kRowsAtOnce, lane_k)] = gathered_b[i];
    }
  };

  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) {
      start(step);
      finish(step);
    }
    cp_async_commit();
    put_pixels(step + 1);
    __syncthreads();
  }
  Tile tile;
  tile.clear();
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // this step is there, and the stage of the one before is free
    const int next = step + STAGES - 1;
    if (next < steps) start(next);
    cp_async_commit();
    put_pixels(next + 1);
    tile.multiply(shared->a[step % STAGES], shared->b[step % STAGES], thread);
    if (next < steps) finish(next);
  }

  scalar_t* const result = static_cast<scalar_t*>(p.grad_weight);
  Sum* const parts = static_cast<Sum*>(p.workspace);
  tile.for_each(thread, [&](int row, int column, const Sum(&values)[Tile::kRun]) {
    if (row >= rows) return;
    const int64_t k = group * plan.M + m0 + row;
#pragma unroll
    for (int e = 0; e < Tile::kRun; ++e) {
      if (column + e >= columns) break;
      if (plan.parts > 1) {
        parts[(part * p.K + k) * plan.N + n0 + column + e] = values[e];
      } else {
        result[k * p.grad_weight_stride[0] + shared->columns[column + e].output] = from_opmath<scalar_t>(values[e]);
      }
    }
  });
}

template <typename scalar_t, bool TENSOR_CORES, bool LARGE, bool GATHER_A, bool GATHER_B>
void launch_backward_weight(const BackwardWeightParams& p, const WeightPlan& plan, Stream stream) {
  constexpr int kM = block_m(LARGE), kN = block_n(TENSOR_CORES, LARGE);
  constexpr int kStages = GATHER_A ? 2 : 4;
  const auto run = [&]<typename Tile>() {
    const int64_t blocks = plan.tiles_m * plan.tiles_n * p.groups * plan.parts;
    launch(conv2d_backward_weight_kernel<Tile, kM, kN, kStages, GATHER_A, GATHER_B>,
           {dim3(grid_of("_conv2d_backward_weight", blocks)), dim3(Tile::kThreads),
            sizeof(WeightShared<Tile, kStages, kN>), stream},
           p, plan);
  };
  if constexpr (TENSOR_CORES) {
    constexpr Major kA = GATHER_A ? Major::kK : Major::kMN, kB = GATHER_B ? Major::kK : Major::kMN;
    run.template operator()<MmaTile<scalar_t, kM, kN, LARGE ? 64 : 32, 32, kA, kB>>();
  } else {
    constexpr int kDepth = 64 / int(sizeof(scalar_t));
    run.template operator()<FmaTile<scalar_t, kM, kN, kDepth, GATHER_A, GATHER_B, 8, LARGE ? 8 : 4>>();
  }
}

}  // namespace pvk::conv2d
