// What follows a tile of sums: bias, scale, shift, residual, activation, 2 x 2 pooling, one rounding, and stores by the
// order of memory. The sums are in shared memory, from where each thread takes a run of channels of a pixel.
#pragma once

#include "core/activation.cuh"
#include "ops/conv2d/gather.cuh"

namespace pvk::conv2d {

// Beside the sums in shared memory.
struct RowPlace {
  int64_t output, residual;  // offsets of the row's pixel; output -1: there is none
};

template <typename Sum, int BLOCK_M, int BLOCK_N>
struct FinishTile {
  static constexpr int kPitch = BLOCK_N + 16 / int(sizeof(Sum));  // reads by rows and by columns spread over the banks
  RowPlace places[BLOCK_M];
  Sum bias[BLOCK_N], scale[BLOCK_N], shift[BLOCK_N];
  alignas(16) Sum sums[BLOCK_M * kPitch];
};

PVK_DEVICE bool multiples_of(const int64_t (&strides)[4], int vec) {
  return strides[1] == 1 && strides[0] % vec == 0 && strides[2] % vec == 0 && strides[3] % vec == 0;
}

PVK_DEVICE bool is_aligned16(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Fills in everything but the sums. column0: of the group.
template <typename Sum, int BLOCK_M, int BLOCK_N, int THREADS>
PVK_DEVICE void place_rows(FinishTile<Sum, BLOCK_M, BLOCK_N>& tile, const GatherGemm& p, const GatherBlock& block,
                           int64_t column0) {
  const int64_t first = block.group * p.outputs + column0;
  for (int i = int(threadIdx.x); i < BLOCK_M; i += THREADS) {
    const int64_t m = block.row0 + i;
    RowPlace place = {-1, 0};
    if (m < block.rows) {
      const Pixel at = pixel_of(block, p.pool, m);
      const int64_t h = p.transposed ? at.h * p.axes[0].stride + block.phase[0] : at.h;
      const int64_t w = p.transposed ? at.w * p.axes[1].stride + block.phase[1] : at.w;
      const int64_t oh = p.pool ? h / 2 : h, ow = p.pool ? w / 2 : w;
      place.output = at.image * p.output_stride[0] + first * p.output_stride[1] + oh * p.output_stride[2] +
                     ow * p.output_stride[3];
      place.residual = at.image * p.residual_stride[0] + first * p.residual_stride[1] + h * p.residual_stride[2] +
                       w * p.residual_stride[3];
    }
    tile.places[i] = place;
  }
  for (int i = int(threadIdx.x); i < BLOCK_N; i += THREADS) {
    const bool inside = column0 + i < p.outputs;
    Sum bias[1] = {0}, scale[1] = {1}, shift[1] = {0};
    if (inside && p.bias != nullptr) load_strided(p.bias, p.bias_dtype, first + i, 1, bias);
    if (inside && p.scale != nullptr) load_strided(p.scale, p.scale_dtype, first + i, 1, scale);
    if (inside && p.shift != nullptr) load_strided(p.shift, p.scale_dtype, first + i, 1, shift);
    tile.bias[i] = bias[0];
    tile.scale[i] = scale[0];
    tile.shift[i] = shift[0];
  }
}

// After a barrier that follows place_rows and the sums.
template <typename scalar_t, typename Sum, int BLOCK_M, int BLOCK_N, int THREADS>
PVK_DEVICE void finish(const FinishTile<Sum, BLOCK_M, BLOCK_N>& tile, const GatherGemm& p, int64_t column0) {
  constexpr int kRun = kVec16<scalar_t>, kRuns = BLOCK_N / kRun;
  const bool last = p.output_stride[1] == 1;
  const bool vectors = multiples_of(p.output_stride, kRun) && p.outputs % kRun == 0 && is_aligned16(p.output);
  const bool residual_vectors =
      multiples_of(p.residual_stride, kRun) && p.outputs % kRun == 0 && is_aligned16(p.residual);
  const int rows = p.pool ? BLOCK_M / 4 : BLOCK_M, each = p.pool ? 4 : 1;
  for (int unit = int(threadIdx.x); unit < rows * kRuns; unit += THREADS) {
    const int row = last ? unit / kRuns : unit % rows, column = (last ? unit % kRuns : unit / rows) * kRun;
    const int left = int(min_of(p.outputs - column0 - column, int64_t(kRun)));
    if (left <= 0 || tile.places[row * each].output < 0) continue;
    Sum best[kRun];
#pragma unroll 1
    for (int j = 0; j < each; ++j) {
      const int at = row * each + j;
      Sum value[kRun];
#pragma unroll
      for (int e = 0; e < kRun; ++e)
        value[e] = (tile.sums[at * tile.kPitch + column + e] + tile.bias[column + e]) * tile.scale[column + e] +
                   tile.shift[column + e];
      if (p.residual != nullptr) {
        const scalar_t* const from = static_cast<const scalar_t*>(p.residual) + tile.places[at].residual;
        if (residual_vectors) {
          const auto vec = load_vec<kRun>(from + column);
#pragma unroll
          for (int e = 0; e < kRun; ++e) value[e] += to_opmath(vec.data[e]);
        } else {
#pragma unroll
          for (int e = 0; e < kRun; ++e)
            if (e < left) value[e] += to_opmath(__ldg(from + (column + e) * p.residual_stride[1]));
        }
      }
      activate_all(p.activation, value);
#pragma unroll
      for (int e = 0; e < kRun; ++e)
        if (j == 0 || value[e] > best[e] || value[e] != value[e]) best[e] = value[e];  // as max_pool2d: NaN wins
    }
    scalar_t* const to = static_cast<scalar_t*>(p.output) + tile.places[row * each].output;
    VecN<scalar_t, kRun> vec;
#pragma unroll
    for (int e = 0; e < kRun; ++e) vec.data[e] = from_opmath<scalar_t>(best[e]);
    if (vectors) {
      store_vec(to + column, vec);
    } else {
#pragma unroll
      for (int e = 0; e < kRun; ++e)
        if (e < left) to[(column + e) * p.output_stride[1]] = vec.data[e];
    }
  }
}

}  // namespace pvk::conv2d
