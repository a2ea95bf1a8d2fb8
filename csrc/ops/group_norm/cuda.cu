// Group normalisation on CUDA: sums of parts, their merging in order, and a pass over the map.
#include "core/dispatch.cuh"
#include "core/group_sum.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/merged_moments.h"
#include "core/norm_pieces.cuh"
#include "core/warp.cuh"
#include "ops/group_norm/group_norm.h"

namespace pvk::group_norm {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kColumns = kWarpSize, kRowsAtOnce = kBlockThreads / kColumns;  // of rows: channels, pixels of a block
constexpr int64_t kTermsOfSum = 32;  // of a thread, before they go to its total: shorter chains of rounding

// Where value i of group g of sample n lies; of neighbouring values, VEC of which divide a channel's or a row's part of
// a group, the neighbours do.
template <typename Params>
PVK_DEVICE int64_t offset_of(const Params& p, int64_t group, int64_t i) {
  const int64_t channels = p.C / p.G;
  if (!p.rows) return group * channels * p.S + i;
  return (group / p.G * p.S + i / channels) * p.C + group % p.G * channels + i % channels;
}

// Where part `part` of `parts` of a group's values begins; parts are of whole vectors.
template <int VEC, typename Params>
PVK_DEVICE int64_t part_begin(const Params& p, int64_t part, int64_t parts) {
  return p.C / p.G * p.S / VEC * part / parts * VEC;
}

// A block owns a part of a group: its mean, by the differences to its first value, and then the squares.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 2)
    group_norm_moments_kernel(const __grid_constant__ GroupNormParams p) {
  using T = opmath_t<scalar_t>;
  const int64_t group = blockIdx.x, part = blockIdx.y, parts = gridDim.y;
  const int64_t begin = part_begin<VEC>(p, part, parts), end = part_begin<VEC>(p, part + 1, parts);
  const scalar_t* const x = static_cast<const scalar_t*>(p.input);
  const T start = to_opmath(__ldg(x + offset_of(p, group, begin))), share = T(1) / T(end - begin);
  T mean[1] = {};
  for (int64_t i = begin + threadIdx.x * VEC; i < end; i += kBlockThreads * VEC) {
    const auto values = load_vec<VEC>(x + offset_of(p, group, i));
#pragma unroll
    for (int e = 0; e < VEC; ++e) mean[0] += (to_opmath(values.data[e]) - start) * share;
  }
  sum_of_group<kBlockThreads>(mean);
  const T center = start + mean[0];
  double sums[2] = {};  // of differences to the center, and of their squares
  for (int64_t i = begin + threadIdx.x * VEC; i < end; i += kBlockThreads * VEC) {
    const auto values = load_vec<VEC>(x + offset_of(p, group, i));
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const double difference = double(to_opmath(values.data[e])) - double(center);
      sums[0] += difference;
      sums[1] += difference * difference;
    }
  }
  sum_of_group<kBlockThreads>(sums);
  if (threadIdx.x != 0) return;
  const double missed = sums[0] / double(end - begin), squares = sums[1] - sums[0] * missed;
  double* const partials = static_cast<double*>(p.scratch) + part * 2 * p.N * p.G;
  partials[group] = double(center) + missed;
  partials[p.N * p.G + group] = squares < 0 ? 0 : squares;
}

// A thread owns a group: its parts merged in order (Chan, Golub and LeVeque).
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 2)
    group_norm_stats_kernel(const __grid_constant__ GroupNormParams p, int parts) {
  using T = opmath_t<scalar_t>;
  const int64_t groups = p.N * p.G, group = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (group >= groups) return;
  const double* const partials = static_cast<const double*>(p.scratch);
  MergedMoments all;
  for (int part = 0; part < parts; ++part) {
    const double count = double(part_begin<VEC>(p, part + 1, parts) - part_begin<VEC>(p, part, parts));
    const double* const of_part = partials + int64_t(part) * 2 * groups + group;
    all.add(count, __ldg(of_part), __ldg(of_part + groups));
  }
  T* const stats = static_cast<T*>(p.stats);
  stats[group] = T(all.mean);
  stats[groups + group] = T(rsqrt_of(all.square / all.count + p.eps));
}

// Sample and channel of element i of the map.
struct Place {
  int64_t n, c;
};

template <typename Params>
PVK_DEVICE Place place_of(const Params& p, int64_t i) {
  if (p.rows) return {i / (p.S * p.C), i % p.C};
  const int64_t plane = i / p.S;
  return {plane / p.C, plane % p.C};
}

// A thread owns VEC neighbours at a time; where VEC > 1 they are of one plane, or of one group of a row.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 2)
    group_norm_forward_kernel(const __grid_constant__ GroupNormParams p) {
  using T = opmath_t<scalar_t>;
  const T* const stats = static_cast<const T*>(p.stats);
  const int64_t count = p.N * p.C * p.S, step = int64_t(gridDim.x) * kBlockThreads * VEC, channels = p.C / p.G;
  const int apart = p.rows ? 1 : 0;
#pragma unroll 1
  for (int64_t i = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) * VEC; i < count; i += step) {
    const Place place = place_of(p, i);
    const int64_t group = place.n * p.G + place.c / channels;
    const T mean = __ldg(stats + group), rstd = __ldg(stats + p.N * p.G + group);
    const auto x = load_vec<VEC>(static_cast<const scalar_t*>(p.input) + i);
    VecN<scalar_t, VEC> rest = {}, output;
    if (p.residual != nullptr) rest = load_vec<VEC>(static_cast<const scalar_t*>(p.residual) + i);
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      T weight[1], bias[1];
      load_weights(p.weight, p.weight_dtype, place.c + e * apart, T(1), weight);
      load_weights(p.bias, p.weight_dtype, place.c + e * apart, T(0), bias);
      T value = (to_opmath(x.data[e]) - mean) * (rstd * weight[0]) + bias[0];
      if (p.residual != nullptr) value += to_opmath(rest.data[e]);
      output.data[e] = from_opmath<scalar_t>(activate(p.activation, value));
    }
    store_vec(static_cast<scalar_t*>(p.output) + i, output);
  }
}

// Scratch of the backward, of double: [parts, N, 2, C], the sums of grad and of grad * (x - mean); then [N, 2, G], what
// they make of a group's gradients.
PVK_DEVICE double* slopes_of(const GroupNormBackwardParams& p, int parts) {
  return static_cast<double*>(p.scratch) + int64_t(parts) * p.N * 2 * p.C;
}

// Planes: a block owns a part of a plane. Rows: kColumns channels of a part of a sample's pixels, a warp every
// kRowsAtOnce-th of them. `columns` blocks to a sample.
template <typename scalar_t, bool kByRows>
__global__ void __launch_bounds__(kBlockThreads, 2)
    group_norm_sums_kernel(const __grid_constant__ GroupNormBackwardParams p, int64_t columns) {
  using T = opmath_t<scalar_t>;
  SIMT_SHARED(double[2][kRowsAtOnce][kColumns], shared);
  const int column = threadIdx.x % kColumns, lead = threadIdx.x / kColumns;
  const int64_t n = blockIdx.x / columns, part = blockIdx.y, parts = gridDim.y;
  const int64_t c = blockIdx.x % columns * (kByRows ? kColumns : 1) + (kByRows ? column : 0);
  const int64_t begin = p.S * part / parts, end = p.S * (part + 1) / parts;
  const int64_t step = kByRows ? kRowsAtOnce : kBlockThreads;
  double sum = 0, product = 0;
  if (c < p.C) {
    const T mean = __ldg(static_cast<const T*>(p.stats) + n * p.G + c / (p.C / p.G));
    const int64_t base = kByRows ? n * p.S * p.C + c : (n * p.C + c) * p.S, stride = kByRows ? p.C : 1;
    for (int64_t first = begin + (kByRows ? lead : threadIdx.x); first < end; first += step * kTermsOfSum) {
      const int64_t last = min_of(first + step * kTermsOfSum, end);
      T some = 0, some_products = 0;
      for (int64_t i = first; i < last; i += step) {
        const int64_t offset = base + i * stride;
        const T grad = gradient_at<scalar_t>(p, offset);
        some += grad;
        some_products += grad * (to_opmath(__ldg(static_cast<const scalar_t*>(p.input) + offset)) - mean);
      }
      sum += double(some);
      product += double(some_products);
    }
  }
  double* const partials = static_cast<double*>(p.scratch) + (part * p.N + n) * 2 * p.C;
  if constexpr (kByRows) {
    shared[0][lead][column] = sum;
    shared[1][lead][column] = product;
    __syncthreads();
    if (lead >= 2 || c >= p.C) return;
    double total = 0;
    for (int row = 0; row < kRowsAtOnce; ++row) total += shared[lead][row][column];
    partials[lead * p.C + c] = total;
  } else {
    double sums[2] = {sum, product};
    sum_of_group<kBlockThreads>(sums);
    if (threadIdx.x >= 2) return;
    partials[threadIdx.x * p.C + c] = threadIdx.x == 0 ? sums[0] : sums[1];
  }
}

// A warp owns a group of a sample: grad_input = (grad * weight - from_sum - (x - mean) * from_product) * rstd.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    group_norm_slopes_kernel(const __grid_constant__ GroupNormBackwardParams p, int parts) {
  const int64_t group = int64_t(blockIdx.x) * kRowsAtOnce + threadIdx.x / kWarpSize;
  if (group >= p.N * p.G) return;
  const int64_t channels = p.C / p.G, n = group / p.G, g = group % p.G;
  const double* const partials = static_cast<const double*>(p.scratch);
  double sums[2] = {};
  for (int64_t c = g * channels + threadIdx.x % kWarpSize; c < (g + 1) * channels; c += kWarpSize) {
    double weight[1];
    load_weights(p.weight, p.weight_dtype, c, 1.0, weight);
    for (int part = 0; part < parts; ++part) {
      const double* const of_sample = partials + (int64_t(part) * p.N + n) * 2 * p.C;
      sums[0] += of_sample[c] * weight[0];
      sums[1] += of_sample[p.C + c] * weight[0];
    }
  }
  sum_of_group<kWarpSize>(sums);
  if (threadIdx.x % kWarpSize != 0) return;
  const double rstd = double(__ldg(static_cast<const T*>(p.stats) + p.N * p.G + group)), count = double(channels * p.S);
  double* const slopes = slopes_of(p, parts) + n * 2 * p.G;
  slopes[g] = sums[0] / count;
  slopes[p.G + g] = sums[1] * rstd * rstd / count;
}

// A thread owns a channel: the gradients of its weight and bias, samples and parts added in order.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    group_norm_backward_vectors_kernel(const __grid_constant__ GroupNormBackwardParams p, int parts) {
  const int64_t c = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (c >= p.C) return;
  const double* const partials = static_cast<const double*>(p.scratch);
  const T* const rstd = static_cast<const T*>(p.stats) + p.N * p.G + c / (p.C / p.G);
  double by_weight = 0, by_bias = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    for (int part = 0; part < parts; ++part) {
      const double* const of_sample = partials + (int64_t(part) * p.N + n) * 2 * p.C;
      by_bias += of_sample[c];
      by_weight += of_sample[p.C + c] * double(__ldg(rstd + n * p.G));
    }
  }
  store_element(p.grad_weight, p.weight_dtype, c, T(by_weight));
  store_element(p.grad_bias, p.weight_dtype, c, T(by_bias));
}

// A thread owns VEC neighbours at a time, as of the forward.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 2)
    group_norm_backward_input_kernel(const __grid_constant__ GroupNormBackwardParams p, int parts) {
  using T = opmath_t<scalar_t>;
  const T* const stats = static_cast<const T*>(p.stats);
  const double* const all_slopes = slopes_of(p, parts);
  const int64_t count = p.N * p.C * p.S, step = int64_t(gridDim.x) * kBlockThreads * VEC, channels = p.C / p.G;
  const int apart = p.rows ? 1 : 0;
#pragma unroll 1
  for (int64_t i = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) * VEC; i < count; i += step) {
    const Place place = place_of(p, i);
    const int64_t g = place.c / channels, group = place.n * p.G + g;
    const auto grad = gradients_at<VEC, scalar_t>(p, i);
    if (p.grad_residual != nullptr) store_vec(static_cast<scalar_t*>(p.grad_residual) + i, grad);
    if (p.grad_input == nullptr) continue;
    const T mean = __ldg(stats + group), rstd = __ldg(stats + p.N * p.G + group);
    const double* const slopes = all_slopes + place.n * 2 * p.G + g;
    const T from_sum = T(__ldg(slopes)), from_product = T(__ldg(slopes + p.G));
    const auto x = load_vec<VEC>(static_cast<const scalar_t*>(p.input) + i);
    VecN<scalar_t, VEC> output;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      T weight[1];
      load_weights(p.weight, p.weight_dtype, place.c + e * apart, T(1), weight);
      const T own = sub_rn(mul_rn(to_opmath(grad.data[e]), weight[0]), from_sum);  // 0 where a group has one value
      output.data[e] = from_opmath<scalar_t>((own - (to_opmath(x.data[e]) - mean) * from_product) * rstd);
    }
    store_vec(static_cast<scalar_t*>(p.grad_input) + i, output);
  }
}

// Whether the map goes by 16 bytes: VEC neighbours are of one plane, or of one group of a row; nullptr does.
template <typename scalar_t, typename Params, typename... Pointers>
bool allows_vectors(const Params& p, Pointers... pointers) {
  const int64_t inner = p.rows ? p.C / p.G : p.S;
  return inner % kVec16<scalar_t> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

LaunchConfig over(int64_t count, int64_t per_block, Stream stream) {
  return {dim3(unsigned(ceil_div(count, per_block))), dim3(kBlockThreads), 0, stream};
}

// Of a group's values: at most one to 16 of them.
template <typename Params>
int parts_of_group(const Params& p) {
  const int64_t values = p.C / p.G * p.S;
  return int(parts_of(max_of(values / 16, int64_t(1)), values));
}

template <typename Params>
int parts_of_sample(const Params& p) {
  return int(parts_of(p.S, p.rows ? p.S * p.C : p.S));
}

}  // namespace

int64_t scratch_bytes(const GroupNormParams& p) {
  return parts_of_group(p) * 2 * p.N * p.G * int64_t(sizeof(double));
}

int64_t scratch_bytes(const GroupNormBackwardParams& p) {
  return (parts_of_sample(p) * p.C + p.G) * p.N * 2 * int64_t(sizeof(double));
}

void forward(const GroupNormParams& p, Stream stream) {
  const int parts = parts_of_group(p);
  const int64_t count = p.N * p.C * p.S, groups = p.N * p.G;
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const auto run = [&]<int VEC>() {
      launch(group_norm_moments_kernel<scalar_t, VEC>,
             {dim3(unsigned(groups), unsigned(parts)), dim3(kBlockThreads), 0, stream}, p);
      launch(group_norm_stats_kernel<scalar_t, VEC>, over(groups, kBlockThreads, stream), p, parts);
      launch(group_norm_forward_kernel<scalar_t, VEC>, over_elements(count, VEC, kBlockThreads, stream), p);
    };
    if (allows_vectors<scalar_t>(p, p.input, p.residual, p.output)) return run.template operator()<kVec16<scalar_t>>();
    run.template operator()<1>();
  });
}

void backward(const GroupNormBackwardParams& p, Stream stream) {
  const int parts = parts_of_sample(p);
  const int64_t count = p.N * p.C * p.S, columns = p.rows ? ceil_div(p.C, int64_t(kColumns)) : p.C;
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const auto sums = p.rows ? group_norm_sums_kernel<scalar_t, true> : group_norm_sums_kernel<scalar_t, false>;
    launch(sums, {dim3(unsigned(p.N * columns), unsigned(parts)), dim3(kBlockThreads), 0, stream}, p, columns);
    if (p.grad_weight != nullptr || p.grad_bias != nullptr)
      launch(group_norm_backward_vectors_kernel<opmath_t<scalar_t>>, over(p.C, kBlockThreads, stream), p, parts);
    if (p.grad_input == nullptr && p.grad_residual == nullptr) return;
    launch(group_norm_slopes_kernel<opmath_t<scalar_t>>, over(p.N * p.G, kRowsAtOnce, stream), p, parts);
    if (allows_vectors<scalar_t>(p, p.input, p.grad, p.output, p.grad_input, p.grad_residual)) {
      constexpr int kVec = kVec16<scalar_t>;
      return launch(group_norm_backward_input_kernel<scalar_t, kVec>, over_elements(count, kVec, kBlockThreads, stream),
                    p, parts);
    }
    launch(group_norm_backward_input_kernel<scalar_t, 1>, over_elements(count, 1, kBlockThreads, stream), p, parts);
  });
}

}  // namespace pvk::group_norm
