// Average pooling on CUDA, forward and backward: a thread gathers what it writes, so there are no atomics.
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/avg_pool2d/avg_pool2d.h"

namespace pvk::avg_pool2d {
namespace {

constexpr int kBlockThreads = 256;

// Element i, in the order of memory, of [N, C / VEC, rows, columns].
struct Place {
  int64_t n, c, row, column;
};

PVK_DEVICE Place place_of(int64_t i, int64_t groups, int64_t rows, int64_t columns, int vec, bool channels_last) {
  const int64_t pixel = channels_last ? i / groups : i, rest = pixel / columns / rows;
  return {channels_last ? rest : rest / groups, (channels_last ? i % groups : rest % groups) * vec,
          pixel / columns % rows, pixel % columns};
}

// A thread owns VEC channels of one output; threads go along the memory of the output. VEC above 1: channels_last.
// Sums of rows, then of these.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 3)
    avg_pool2d_forward_kernel(const __grid_constant__ AvgPool2dParams p, int64_t count) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const Place at = place_of(i, p.C / VEC, p.rows.outputs, p.columns.outputs, VEC, p.channels_last);
    const PoolRange rows = p.rows.window(at.row), columns = p.columns.window(at.column);
    const scalar_t* const map = static_cast<const scalar_t*>(p.map) + at.n * p.map_stride[0] + at.c * p.map_stride[1];
    T total[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) total[e] = T(0);
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      T sum[VEC];
#pragma unroll
      for (int e = 0; e < VEC; ++e) sum[e] = T(0);
      for (int64_t x = columns.begin; x < columns.end; ++x) {
        const VecN<scalar_t, VEC> value = load_vec<VEC>(map + y * p.map_stride[2] + x * p.map_stride[3]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum[e] += to_opmath(value.data[e]);
      }
#pragma unroll
      for (int e = 0; e < VEC; ++e) total[e] += sum[e];
    }
    const T divisor = T(p.divisor_of(p.rows, true, at.row) * p.divisor_of(p.columns, false, at.column));
    VecN<scalar_t, VEC> result;
#pragma unroll
    for (int e = 0; e < VEC; ++e) result.data[e] = from_opmath<scalar_t>(total[e] / divisor);
    store_vec(static_cast<scalar_t*>(p.pooled) + at.n * p.pooled_stride[0] + at.c * p.pooled_stride[1] +
                  at.row * p.pooled_stride[2] + at.column * p.pooled_stride[3],
              result);
  }
}

// A thread owns VEC channels of one pixel of the gradient: it adds, in their order, the gradients of the windows that
// the pixel is in. Threads go along the memory of the gradient. VEC above 1: channels_last.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 3)
    avg_pool2d_backward_kernel(const __grid_constant__ AvgPool2dParams p, int64_t count) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const Place at = place_of(i, p.C / VEC, p.rows.size, p.columns.size, VEC, p.channels_last);
    const PoolRange rows = p.rows.outputs_of(at.row), columns = p.columns.outputs_of(at.column);
    const scalar_t* const grad =
        static_cast<const scalar_t*>(p.pooled) + at.n * p.pooled_stride[0] + at.c * p.pooled_stride[1];
    T sum[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) sum[e] = T(0);
    for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
      const double row_divisor = p.divisor_of(p.rows, true, oh);
      for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
        const T divisor = T(row_divisor * p.divisor_of(p.columns, false, ow));
        const VecN<scalar_t, VEC> value = load_vec<VEC>(grad + oh * p.pooled_stride[2] + ow * p.pooled_stride[3]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum[e] += to_opmath(value.data[e]) / divisor;
      }
    }
    VecN<scalar_t, VEC> result;
#pragma unroll
    for (int e = 0; e < VEC; ++e) result.data[e] = from_opmath<scalar_t>(sum[e]);
    store_vec(static_cast<scalar_t*>(p.map) + at.n * p.map_stride[0] + at.c * p.map_stride[1] +
                  at.row * p.map_stride[2] + at.column * p.map_stride[3],
              result);
  }
}

LaunchConfig config_of(int64_t count, Stream stream) {
  const int64_t blocks = min_of(ceil_div(count, int64_t(kBlockThreads)), int64_t(1) << 22);
  return {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream};
}

// Whether channels can be read and written as 16-byte vectors.
template <typename scalar_t>
bool allows_vectors(const AvgPool2dParams& p) {
  constexpr int64_t kVec = kVec16<scalar_t>;
  if (!p.channels_last || p.C % kVec != 0) return false;
  for (int i = 0; i < 4; ++i)
    if (i != 1 && (p.map_stride[i] % kVec != 0 || p.pooled_stride[i] % kVec != 0)) return false;
  return reinterpret_cast<uintptr_t>(p.map) % 16 == 0 && reinterpret_cast<uintptr_t>(p.pooled) % 16 == 0;
}

}  // namespace

void forward(const AvgPool2dParams& p, Stream stream) {
  const int64_t count = p.N * p.C * p.rows.outputs * p.columns.outputs;
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kVec = kVec16<scalar_t>;
    if (allows_vectors<scalar_t>(p)) {
      launch(avg_pool2d_forward_kernel<scalar_t, kVec>, config_of(count / kVec, stream), p, count / kVec);
    } else {
      launch(avg_pool2d_forward_kernel<scalar_t, 1>, config_of(count, stream), p, count);
    }
  });
}

void backward(const AvgPool2dParams& p, Stream stream) {
  const int64_t count = p.N * p.C * p.rows.size * p.columns.size;
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kVec = kVec16<scalar_t>;
    if (allows_vectors<scalar_t>(p)) {
      launch(avg_pool2d_backward_kernel<scalar_t, kVec>, config_of(count / kVec, stream), p, count / kVec);
    } else {
      launch(avg_pool2d_backward_kernel<scalar_t, 1>, config_of(count, stream), p, count);
    }
  });
}

}  // namespace pvk::avg_pool2d
