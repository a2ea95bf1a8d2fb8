// Batch normalisation on CUDA: sums of parts of a channel, their merging in order, and a pass over the map.
#include "core/dispatch.cuh"
#include "core/group_sum.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/merged_moments.h"
#include "core/norm_pieces.cuh"
#include "core/warp.cuh"
#include "ops/batch_norm/batch_norm.h"

namespace pvk::batch_norm {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kColumns = kWarpSize, kRowsAtOnce = kBlockThreads / kColumns;  // of rows: channels, pixels of a block

// Where value i of a channel lies.
template <typename Params>
PVK_DEVICE int64_t offset_of(const Params& p, int64_t c, int64_t i) {
  return p.rows || p.S == 1 ? i * p.C + c : (i / p.S * p.C + c) * p.S + i % p.S;
}

template <typename Params>
PVK_DEVICE int64_t part_begin(const Params& p, int64_t part, int64_t parts) {
  return p.N * p.S * part / parts;
}

// Planes: a block owns a part of a channel: its mean, by the differences to its first value, and then the squares. In
// double: a mean may be far below the deviations, and is to be exact beside itself.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_norm_moments_of_planes_kernel(const __grid_constant__ BatchNormParams p) {
  const int64_t c = blockIdx.x, part = blockIdx.y, parts = gridDim.y;
  const int64_t begin = part_begin(p, part, parts), end = part_begin(p, part + 1, parts);
  const scalar_t* const x = static_cast<const scalar_t*>(p.input);
  const double start = double(to_opmath(__ldg(x + offset_of(p, c, begin)))), share = 1.0 / double(end - begin);
  double mean[1] = {};
  for (int64_t i = begin + threadIdx.x; i < end; i += kBlockThreads)
    mean[0] += (double(to_opmath(__ldg(x + offset_of(p, c, i)))) - start) * share;
  sum_of_group<kBlockThreads>(mean);
  const double center = start + mean[0];
  double sums[2] = {};
  for (int64_t i = begin + threadIdx.x; i < end; i += kBlockThreads) {
    const double difference = double(to_opmath(__ldg(x + offset_of(p, c, i)))) - center;
    sums[0] += difference;
    sums[1] += difference * difference;
  }
  sum_of_group<kBlockThreads>(sums);
  if (threadIdx.x != 0) return;
  const double missed = sums[0] * share, squares = sums[1] - sums[0] * missed;
  double* const partials = static_cast<double*>(p.partials);
  partials[part * 2 * p.C + c] = center + missed;
  partials[(part * 2 + 1) * p.C + c] = squares < 0 ? 0 : squares;
}

// Rows: a block owns kColumns channels of a part of the pixels, a warp every kRowsAtOnce-th of them.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_norm_moments_of_rows_kernel(const __grid_constant__ BatchNormParams p) {
  SIMT_SHARED(double[2][kRowsAtOnce][kColumns], shared);
  const int column = threadIdx.x % kColumns, lead = threadIdx.x / kColumns;
  const int64_t part = blockIdx.y, parts = gridDim.y, c = int64_t(blockIdx.x) * kColumns + column;
  const int64_t begin = part_begin(p, part, parts) + lead, end = part_begin(p, part + 1, parts);
  const scalar_t* const x = static_cast<const scalar_t*>(p.input);
  const int64_t count = begin < end ? (end - begin + kRowsAtOnce - 1) / kRowsAtOnce : 0;
  double mean = 0, square = 0;
  if (c < p.C && count > 0) {
    const double start = double(to_opmath(__ldg(x + begin * p.C + c))), share = 1.0 / double(count);
    double sum = 0;
    for (int64_t i = begin; i < end; i += kRowsAtOnce)
      sum += (double(to_opmath(__ldg(x + i * p.C + c))) - start) * share;
    const double center = start + sum;
    sum = 0;
    for (int64_t i = begin; i < end; i += kRowsAtOnce) {
      const double difference = double(to_opmath(__ldg(x + i * p.C + c))) - center;
      sum += difference;
      square += difference * difference;
    }
    square -= sum * (sum * share);
    square = square < 0 ? 0 : square;
    mean = center + sum * share;
  }
  shared[0][lead][column] = mean;
  shared[1][lead][column] = square;
  __syncthreads();
  if (lead != 0 || c >= p.C) return;
  MergedMoments all;
  for (int row = 0; row < kRowsAtOnce; ++row) {
    const int64_t first = begin + row;
    const int64_t values = first < end ? (end - first + kRowsAtOnce - 1) / kRowsAtOnce : 0;
    all.add(double(values), shared[0][row][column], shared[1][row][column]);
  }
  double* const partials = static_cast<double*>(p.partials);
  partials[part * 2 * p.C + c] = all.mean;
  partials[(part * 2 + 1) * p.C + c] = all.square;
}

// A thread owns a channel: its parts merged in order, or the running statistics.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_norm_stats_kernel(const __grid_constant__ BatchNormParams p, int parts) {
  using T = opmath_t<scalar_t>;
  const int64_t c = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (c >= p.C) return;
  T* const stats = static_cast<T*>(p.stats);
  if (!p.training) {
    T mean[1], variance[1];
    load_strided(p.running_mean, p.running_dtype, c, 1, mean);
    load_strided(p.running_var, p.running_dtype, c, 1, variance);
    stats[c] = mean[0];
    stats[p.C + c] = rsqrt_of(variance[0] + T(p.eps));
    stats[2 * p.C + c] = variance[0];
    return;
  }
  const double* const partials = static_cast<const double*>(p.partials);
  MergedMoments all;
  for (int part = 0; part < parts; ++part) {
    const double count = double(part_begin(p, part + 1, parts) - part_begin(p, part, parts));
    all.add(count, __ldg(partials + int64_t(part) * 2 * p.C + c), __ldg(partials + (int64_t(part) * 2 + 1) * p.C + c));
  }
  stats[c] = T(all.mean);
  stats[p.C + c] = T(rsqrt_of(all.square / all.count + p.eps));
  stats[2 * p.C + c] = T(all.square / (all.count - 1));
}

// The channel of element i of the map.
template <typename Params>
PVK_DEVICE int64_t channel_of(const Params& p, int64_t i) {
  return p.rows || p.S == 1 ? i % p.C : i / p.S % p.C;
}

// A thread owns VEC neighbours at a time; where VEC > 1 they are of one plane, or of VEC channels of a row.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_norm_forward_kernel(const __grid_constant__ BatchNormParams p) {
  using T = opmath_t<scalar_t>;
  const T* const stats = static_cast<const T*>(p.stats);
  const bool rows = p.rows || p.S == 1;
  const int64_t count = p.N * p.C * p.S, step = int64_t(gridDim.x) * kBlockThreads * VEC;
  for (int64_t i = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) * VEC; i < count; i += step) {
    const int64_t c = channel_of(p, i), apart = rows ? 1 : 0;
    const auto x = load_vec<VEC>(static_cast<const scalar_t*>(p.input) + i);
    VecN<scalar_t, VEC> rest = {}, output;
    if (p.residual != nullptr) rest = load_vec<VEC>(static_cast<const scalar_t*>(p.residual) + i);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const int64_t channel = c + e * apart;
      T weight[1], bias[1];
      load_weights(p.weight, p.weight_dtype, channel, T(1), weight);
      load_weights(p.bias, p.weight_dtype, channel, T(0), bias);
      T value = (to_opmath(x.data[e]) - __ldg(stats + channel)) * (__ldg(stats + p.C + channel) * weight[0]) + bias[0];
      if (p.residual != nullptr) value += to_opmath(rest.data[e]);
      output.data[e] = from_opmath<scalar_t>(activate(p.activation, value));
    }
    store_vec(static_cast<scalar_t*>(p.output) + i, output);
  }
}

// Planes: a block owns a part of a channel: the sums of grad and of grad * (x - mean).
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_norm_sums_of_planes_kernel(const __grid_constant__ BatchNormBackwardParams p) {
  using T = opmath_t<scalar_t>;
  const int64_t c = blockIdx.x, part = blockIdx.y, parts = gridDim.y;
  const int64_t end = part_begin(p, part + 1, parts);
  const T mean = __ldg(static_cast<const T*>(p.stats) + c);
  double sums[2] = {};
  for (int64_t i = part_begin(p, part, parts) + threadIdx.x; i < end; i += kBlockThreads) {
    const int64_t offset = offset_of(p, c, i);
    const T grad = gradient_at<scalar_t>(p, offset);
    sums[0] += double(grad);
    sums[1] += double(grad * (to_opmath(__ldg(static_cast<const scalar_t*>(p.input) + offset)) - mean));
  }
  sum_of_group<kBlockThreads>(sums);
  if (threadIdx.x != 0) return;
  double* const partials = static_cast<double*>(p.partials);
  partials[part * 2 * p.C + c] = sums[0];
  partials[(part * 2 + 1) * p.C + c] = sums[1];
}

// Rows: a block owns kColumns channels of a part of the pixels, a warp every kRowsAtOnce-th of them.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_norm_sums_of_rows_kernel(const __grid_constant__ BatchNormBackwardParams p) {
  using T = opmath_t<scalar_t>;
  SIMT_SHARED(double[2][kRowsAtOnce][kColumns], shared);
  const int column = threadIdx.x % kColumns, lead = threadIdx.x / kColumns;
  const int64_t part = blockIdx.y, parts = gridDim.y, c = int64_t(blockIdx.x) * kColumns + column;
  const int64_t end = part_begin(p, part + 1, parts);
  double sum = 0, product = 0;
  if (c < p.C) {
    const T mean = __ldg(static_cast<const T*>(p.stats) + c);
    for (int64_t i = part_begin(p, part, parts) + lead; i < end; i += kRowsAtOnce) {
      const T grad = gradient_at<scalar_t>(p, i * p.C + c);
      sum += double(grad);
      product += double(grad * (to_opmath(__ldg(static_cast<const scalar_t*>(p.input) + i * p.C + c)) - mean));
    }
  }
  shared[0][lead][column] = sum;
  shared[1][lead][column] = product;
  __syncthreads();
  if (lead >= 2 || c >= p.C) return;
  double total = 0;
  for (int row = 0; row < kRowsAtOnce; ++row) total += shared[lead][row][column];
  static_cast<double*>(p.partials)[(part * 2 + lead) * p.C + c] = total;
}

// A thread owns a channel: its parts added in order. What its gradients need takes the place of the first part:
// grad_input = (grad - from_sum - (x - mean) * from_product) * rstd * weight.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_norm_slopes_kernel(const __grid_constant__ BatchNormBackwardParams p, int parts) {
  const int64_t c = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (c >= p.C) return;
  double* const partials = static_cast<double*>(p.partials);
  double sum = 0, product = 0;
  for (int part = 0; part < parts; ++part) {
    sum += partials[int64_t(part) * 2 * p.C + c];
    product += partials[(int64_t(part) * 2 + 1) * p.C + c];
  }
  const double rstd = double(__ldg(static_cast<const T*>(p.stats) + p.C + c)), count = double(p.N * p.S);
  store_element(p.grad_weight, p.weight_dtype, c, T(product * rstd));
  store_element(p.grad_bias, p.weight_dtype, c, T(sum));
  partials[c] = p.training ? sum / count : 0;
  partials[p.C + c] = p.training ? product * rstd * rstd / count : 0;
}

// A thread owns VEC neighbours at a time, as of the forward.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 2)
    batch_norm_backward_input_kernel(const __grid_constant__ BatchNormBackwardParams p) {
  using T = opmath_t<scalar_t>;
  const T* const stats = static_cast<const T*>(p.stats);
  const double* const slopes = static_cast<const double*>(p.partials);
  const bool rows = p.rows || p.S == 1;
  const int64_t count = p.N * p.C * p.S, step = int64_t(gridDim.x) * kBlockThreads * VEC;
  for (int64_t i = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) * VEC; i < count; i += step) {
    const int64_t c = channel_of(p, i), apart = rows ? 1 : 0;
    const auto x = load_vec<VEC>(static_cast<const scalar_t*>(p.input) + i);
    const auto grad = gradients_at<VEC, scalar_t>(p, i);
    if (p.grad_residual != nullptr) store_vec(static_cast<scalar_t*>(p.grad_residual) + i, grad);
    if (p.grad_input == nullptr) continue;
    VecN<scalar_t, VEC> output;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const int64_t channel = c + e * apart;
      T weight[1];
      load_weights(p.weight, p.weight_dtype, channel, T(1), weight);
      const T difference = to_opmath(x.data[e]) - __ldg(stats + channel);
      const T from_sum = T(__ldg(slopes + channel)), from_product = T(__ldg(slopes + p.C + channel));
      const T slope = to_opmath(grad.data[e]) - from_sum - difference * from_product;
      output.data[e] = from_opmath<scalar_t>(slope * (__ldg(stats + p.C + channel) * weight[0]));
    }
    store_vec(static_cast<scalar_t*>(p.grad_input) + i, output);
  }
}

// Whether the map goes by 16 bytes: VEC neighbours are of one plane, or of one row; nullptr does.
template <typename scalar_t, typename Params, typename... Pointers>
bool allows_vectors(const Params& p, Pointers... pointers) {
  const int64_t inner = p.rows || p.S == 1 ? p.C : p.S;
  return inner % kVec16<scalar_t> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

LaunchConfig over_channels(int64_t C, Stream stream) {
  return {dim3(unsigned(ceil_div(C, int64_t(kBlockThreads)))), dim3(kBlockThreads), 0, stream};
}

// One block a channel, or kColumns of them, and part.
template <typename Params>
LaunchConfig over_parts(const Params& p, int parts, Stream stream) {
  const int64_t columns = p.rows || p.S == 1 ? ceil_div(p.C, int64_t(kColumns)) : p.C;
  return {dim3(unsigned(columns), unsigned(parts)), dim3(kBlockThreads), 0, stream};
}

}  // namespace

void forward(const BatchNormParams& p, Stream stream) {
  const int parts = int(parts_of(p.N * p.S, p.C));
  const int64_t count = p.N * p.C * p.S;
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    if (p.training) {
      const auto kernel = p.rows || p.S == 1 ? batch_norm_moments_of_rows_kernel<scalar_t>
                                             : batch_norm_moments_of_planes_kernel<scalar_t>;
      launch(kernel, over_parts(p, parts, stream), p);
    }
    launch(batch_norm_stats_kernel<scalar_t>, over_channels(p.C, stream), p, parts);
    if (allows_vectors<scalar_t>(p, p.input, p.residual, p.output)) {
      constexpr int kVec = kVec16<scalar_t>;
      return launch(batch_norm_forward_kernel<scalar_t, kVec>, over_elements(count, kVec, kBlockThreads, stream), p);
    }
    launch(batch_norm_forward_kernel<scalar_t, 1>, over_elements(count, 1, kBlockThreads, stream), p);
  });
}

void backward(const BatchNormBackwardParams& p, Stream stream) {
  const int parts = int(parts_of(p.N * p.S, p.C));
  const int64_t count = p.N * p.C * p.S;
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const auto kernel =
        p.rows || p.S == 1 ? batch_norm_sums_of_rows_kernel<scalar_t> : batch_norm_sums_of_planes_kernel<scalar_t>;
    launch(kernel, over_parts(p, parts, stream), p);
    launch(batch_norm_slopes_kernel<opmath_t<scalar_t>>, over_channels(p.C, stream), p, parts);
    if (p.grad_input == nullptr && p.grad_residual == nullptr) return;
    if (allows_vectors<scalar_t>(p, p.input, p.grad, p.output, p.grad_input, p.grad_residual)) {
      constexpr int kVec = kVec16<scalar_t>;
      return launch(batch_norm_backward_input_kernel<scalar_t, kVec>, over_elements(count, kVec, kBlockThreads, stream),
                    p);
    }
    launch(batch_norm_backward_input_kernel<scalar_t, 1>, over_elements(count, 1, kBlockThreads, stream), p);
  });
}

int64_t partials_of(int64_t values, int64_t channels) {
  return parts_of(values, channels) * 2 * channels;
}

}  // namespace pvk::batch_norm
