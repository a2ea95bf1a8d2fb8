// Layer normalisation on CUDA: a warp, or a block, a row; 16 bytes at a time where rows allow.
#include "core/dispatch.cuh"
#include "core/group_sum.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/layer_norm/layer_norm.h"

namespace pvk::layer_norm {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kColumns = kWarpSize, kRowsAtOnce = kBlockThreads / kColumns;  // of the sums over rows
constexpr int64_t kFeaturesOfWarp = 1024;                                    // up to so many a row is a warp's
constexpr int64_t kMostBlocks = 2147483647;

// x[i] ... of a row: input, or input + residual rounded to scalar_t.
template <int VEC, typename scalar_t>
PVK_DEVICE VecN<scalar_t, VEC> load_row(const scalar_t* input, const scalar_t* residual, int64_t i) {
  VecN<scalar_t, VEC> x = load_vec<VEC>(input + i);
  if (residual == nullptr) return x;
  const VecN<scalar_t, VEC> rest = load_vec<VEC>(residual + i);
#pragma unroll
  for (int e = 0; e < VEC; ++e) x.data[e] = from_opmath<scalar_t>(to_opmath(x.data[e]) + to_opmath(rest.data[e]));
  return x;
}

// Threads own a row, each of them every Threads-th vector. Three passes, the last two from the caches: the mean of the
// differences to the first element, what it misses and the squares, the result.
template <typename scalar_t, int VEC, int Threads>
__global__ void __launch_bounds__(kBlockThreads, 2)
    layer_norm_forward_kernel(const __grid_constant__ LayerNormParams p) {
  using T = opmath_t<scalar_t>;
  constexpr int kRowsOfBlock = kBlockThreads / Threads;
  const int64_t first = int64_t(threadIdx.x % Threads) * VEC;
  const T share = T(1) / T(p.N);
  T* const stats = static_cast<T*>(p.stats);
  for (int64_t m = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / Threads; m < p.M;
       m += int64_t(gridDim.x) * kRowsOfBlock) {
    const scalar_t* const input = static_cast<const scalar_t*>(p.input) + m * p.N;
    const scalar_t* const residual =
        p.residual == nullptr ? nullptr : static_cast<const scalar_t*>(p.residual) + m * p.N;
    const T start = to_opmath(load_row<1>(input, residual, 0).data[0]);
    T mean[1] = {};
    for (int64_t i = first; i < p.N; i += Threads * VEC) {
      const auto x = load_row<VEC>(input, residual, i);
      if (residual != nullptr) store_vec(static_cast<scalar_t*>(p.sum) + m * p.N + i, x);
#pragma unroll
      for (int e = 0; e < VEC; ++e) mean[0] += (to_opmath(x.data[e]) - start) * share;
    }
    sum_of_group<Threads>(mean);
    const T center = start + mean[0];
    T sums[2] = {};  // of differences to the center, and of their squares
    for (int64_t i = first; i < p.N; i += Threads * VEC) {
      const auto x = load_row<VEC>(input, residual, i);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        const T difference = to_opmath(x.data[e]) - center;
        sums[0] += difference;
        sums[1] += difference * difference;
      }
    }
    sum_of_group<Threads>(sums);
    const T missed = sums[0] * share, squares = sums[1] - sums[0] * missed;
    const T exact = center + missed;
    const T rstd = rsqrt_of((squares < T(0) ? T(0) : squares) / T(p.N) + T(p.eps));
    if (first == 0) {
      stats[m] = exact;
      stats[p.M + m] = rstd;
    }
#pragma unroll 1
    for (int64_t i = first; i < p.N; i += Threads * VEC) {
      const auto x = load_row<VEC>(input, residual, i);
      T weight[VEC], bias[VEC];
      load_weights(p.weight, p.weight_dtype, i, T(1), weight);
      load_weights(p.bias, p.weight_dtype, i, T(0), bias);
      VecN<scalar_t, VEC> output;
#pragma unroll
      for (int e = 0; e < VEC; ++e)
        output.data[e] = from_opmath<scalar_t>((to_opmath(x.data[e]) - exact) * rstd * weight[e] + bias[e]);
      store_vec(static_cast<scalar_t*>(p.output) + m * p.N + i, output);
    }
  }
}

// Threads own a row, as above. With g = grad * weight, y = (x - mean) * rstd:
// grad_input = rstd * (g - mean of g - y * mean of g y).
template <typename scalar_t, int VEC, int Threads>
__global__ void __launch_bounds__(kBlockThreads, 2)
    layer_norm_backward_input_kernel(const __grid_constant__ LayerNormBackwardParams p) {
  using T = opmath_t<scalar_t>;
  constexpr int kRowsOfBlock = kBlockThreads / Threads;
  const int64_t first = int64_t(threadIdx.x % Threads) * VEC;
  const T share = T(1) / T(p.N);
  const T* const stats = static_cast<const T*>(p.stats);
  for (int64_t m = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / Threads; m < p.M;
       m += int64_t(gridDim.x) * kRowsOfBlock) {
    const scalar_t* const input = static_cast<const scalar_t*>(p.input) + m * p.N;
    const scalar_t* const grad = static_cast<const scalar_t*>(p.grad) + m * p.N;
    const scalar_t* const rest = p.grad_sum == nullptr ? nullptr : static_cast<const scalar_t*>(p.grad_sum) + m * p.N;
    const T mean = __ldg(stats + m), rstd = __ldg(stats + p.M + m);
    T means[2] = {};  // of g, of g y
#pragma unroll 1
    for (int64_t i = first; i < p.N; i += Threads * VEC) {
      const auto x = load_vec<VEC>(input + i), g = load_vec<VEC>(grad + i);
      T weight[VEC];
      load_weights(p.weight, p.weight_dtype, i, T(1), weight);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        const T weighed = to_opmath(g.data[e]) * weight[e];
        means[0] += weighed;
        means[1] += weighed * ((to_opmath(x.data[e]) - mean) * rstd);
      }
    }
    sum_of_group<Threads>(means);
    means[0] *= share;
    means[1] *= share;
#pragma unroll 1
    for (int64_t i = first; i < p.N; i += Threads * VEC) {
      const auto x = load_vec<VEC>(input + i), g = load_vec<VEC>(grad + i);
      T weight[VEC];
      load_weights(p.weight, p.weight_dtype, i, T(1), weight);
      VecN<scalar_t, VEC> more = {}, result;
      if (rest != nullptr) more = load_vec<VEC>(rest + i);
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        const T y = (to_opmath(x.data[e]) - mean) * rstd;
        const T value = (to_opmath(g.data[e]) * weight[e] - means[0] - y * means[1]) * rstd;
        result.data[e] = from_opmath<scalar_t>(rest == nullptr ? value : value + to_opmath(more.data[e]));
      }
      store_vec(static_cast<scalar_t*>(p.grad_input) + m * p.N + i, result);
    }
  }
}

// A block owns kColumns features of a part of the rows, a warp every kRowsAtOnce-th row of it.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 2)
    layer_norm_parts_kernel(const __grid_constant__ LayerNormBackwardParams p) {
  using T = opmath_t<scalar_t>;
  SIMT_SHARED(T[2][kRowsAtOnce][kColumns], shared);
  const int column = threadIdx.x % kColumns, lead = threadIdx.x / kColumns;
  const int64_t part = blockIdx.y, parts = gridDim.y;
  const int64_t begin = p.M * part / parts, end = p.M * (part + 1) / parts;
  const int64_t n = int64_t(blockIdx.x) * kColumns + column;
  const scalar_t* const input = static_cast<const scalar_t*>(p.input);
  const scalar_t* const grad = static_cast<const scalar_t*>(p.grad);
  const T* const stats = static_cast<const T*>(p.stats);
  T by_weight = 0, by_bias = 0;
  if (n < p.N) {
    for (int64_t m = begin + lead; m < end; m += kRowsAtOnce) {
      const T g = to_opmath(__ldg(grad + m * p.N + n));
      by_weight += g * ((to_opmath(__ldg(input + m * p.N + n)) - __ldg(stats + m)) * __ldg(stats + p.M + m));
      by_bias += g;
    }
  }
  shared[0][lead][column] = by_weight;
  shared[1][lead][column] = by_bias;
  __syncthreads();
  if (lead < 2 && n < p.N) {
    T sum = 0;
    for (int row = 0; row < kRowsAtOnce; ++row) sum += shared[lead][row][column];
    static_cast<T*>(p.partials)[(part * 2 + lead) * p.N + n] = sum;
  }
}

// A thread owns a feature: the sum over its parts. `which`: 0 of the weight, 1 of the bias.
template <typename T, typename weight_t>
__global__ void __launch_bounds__(kBlockThreads, 2)
    layer_norm_total_kernel(const T* partials, weight_t* result, int64_t N, int parts, int which) {
  const int64_t n = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (n >= N) return;
  T sum = 0;
  for (int part = 0; part < parts; ++part) sum += __ldg(partials + (int64_t(part) * 2 + which) * N + n);
  result[n] = from_opmath<weight_t>(opmath_t<weight_t>(sum));
}

template <typename T>
void launch_total(const LayerNormBackwardParams& p, int parts, int which, void* target, Stream stream) {
  if (target == nullptr) return;
  const dim3 grid(unsigned(ceil_div(p.N, int64_t(kBlockThreads))));
  dispatch_dtype(p.weight_dtype, [&]<typename weight_t>() {
    launch(layer_norm_total_kernel<T, weight_t>, {grid, dim3(kBlockThreads), 0, stream},
           static_cast<const T*>(p.partials), static_cast<weight_t*>(target), p.N, parts, which);
  });
}

// Whether rows of N elements go by 16 bytes; nullptr does.
template <typename scalar_t, typename... Pointers>
bool allows_vectors(int64_t N, Pointers... pointers) {
  return N % kVec16<scalar_t> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// body<VEC, Threads>(grid)
template <typename scalar_t, typename Body>
void with_shape(bool vectors, int64_t M, int64_t N, const Body& body) {
  constexpr int64_t kRowsOfBlock = kBlockThreads / kWarpSize;
  const dim3 of_warps(unsigned(min_of(ceil_div(M, kRowsOfBlock), kMostBlocks))),
      of_blocks(unsigned(min_of(M, kMostBlocks)));
  const bool warp = N <= kFeaturesOfWarp;
  if (vectors) {
    if (warp) return body.template operator()<kVec16<scalar_t>, kWarpSize>(of_warps);
    return body.template operator()<kVec16<scalar_t>, kBlockThreads>(of_blocks);
  }
  if (warp) return body.template operator()<1, kWarpSize>(of_warps);
  body.template operator()<1, kBlockThreads>(of_blocks);
}

}  // namespace

void forward(const LayerNormParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const bool vectors = allows_vectors<scalar_t>(p.N, p.input, p.residual, p.output, p.sum);
    with_shape<scalar_t>(vectors, p.M, p.N, [&]<int VEC, int Threads>(dim3 grid) {
      launch(layer_norm_forward_kernel<scalar_t, VEC, Threads>, {grid, dim3(kBlockThreads), 0, stream}, p);
    });
  });
}

void backward(const LayerNormBackwardParams& p, Stream stream) {
  const int parts = int(parts_of(p.M));
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    if (p.grad_input != nullptr && p.M > 0) {
      const bool vectors = allows_vectors<scalar_t>(p.N, p.input, p.grad, p.grad_sum, p.grad_input);
      with_shape<scalar_t>(vectors, p.M, p.N, [&]<int VEC, int Threads>(dim3 grid) {
        launch(layer_norm_backward_input_kernel<scalar_t, VEC, Threads>, {grid, dim3(kBlockThreads), 0, stream}, p);
      });
    }
    if (p.grad_weight == nullptr && p.grad_bias == nullptr) return;
    if (parts > 0) {
      const dim3 grid(unsigned(ceil_div(p.N, int64_t(kColumns))), unsigned(parts));
      launch(layer_norm_parts_kernel<scalar_t>, {grid, dim3(kBlockThreads), 0, stream}, p);
    }
    launch_total<opmath_t<scalar_t>>(p, parts, 0, p.grad_weight, stream);
    launch_total<opmath_t<scalar_t>>(p, parts, 1, p.grad_bias, stream);
  });
}

}  // namespace pvk::layer_norm
