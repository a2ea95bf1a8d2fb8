// The gradient of conv2d with respect to its weight, on CUDA: how the product is cut, the kernels for dense channels,
// and the sum of the parts.
#include "core/dispatch.cuh"
#include "ops/conv2d/backward_weight.cuh"
#include "ops/conv2d/cuda_kernels.h"

namespace pvk::conv2d {
namespace {

constexpr int64_t kWantedBlocks = 264;  // two waves of 132 multiprocessors
constexpr int64_t kLeastPixels = 512;   // of a part: below, its tile costs more to write and to add than to make

// Whether each pixel's channels of a group are whole vectors of 16 bytes.
bool has_vectors(const void* data, const int64_t* stride, const int64_t* size, int64_t channels, int64_t vec) {
  bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[1] == 1 && channels % vec == 0;
  for (int i : {0, 2, 3}) whole = whole && (size[i] == 1 || stride[i] % vec == 0);
  return whole;
}

WeightPlan plan_of(const BackwardWeightParams& p) {
  WeightPlan plan{};
  const bool wide = p.dtype == DType::kFloat64, half = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  const int64_t vec = 16 / (wide ? 8 : half ? 2 : 4);
  plan.M = p.K / p.groups;
  plan.N = p.R * p.S * (p.C / p.groups);
  plan.pixels = p.N * p.OH * p.OW;
  const int64_t output_size[] = {p.N, p.K, p.OH, p.OW}, input_size[] = {p.N, p.C, p.H, p.W};
  plan.vector_output = has_vectors(p.grad_output, p.grad_output_stride, output_size, plan.M, vec);
  plan.vector_input = plan.vector_output && has_vectors(p.input, p.input_stride, input_size, p.C / p.groups, vec);
  plan.tensor_cores = half || (p.dtype == DType::kFloat32 && p.algorithm == Algorithm::kTf32);
  plan.large = plan.vector_input && !wide && plan.M > block_m(false) && plan.N > block_n(plan.tensor_cores, false);
  plan.tiles_m = ceil_div(plan.M, int64_t(block_m(plan.large)));
  plan.tiles_n = ceil_div(plan.N, int64_t(block_n(plan.tensor_cores, plan.large)));
  const int64_t tiles = plan.tiles_m * plan.tiles_n * p.groups;
  const int64_t most = max_of(int64_t(1), min_of(kWantedBlocks / tiles, plan.pixels / kLeastPixels));
  constexpr int64_t kWhole = 32;  // a multiple of every kernel's step
  plan.pixels_of_part = max_of(kWhole, ceil_div(ceil_div(plan.pixels, most), kWhole) * kWhole);
  plan.parts = max_of(int64_t(1), ceil_div(plan.pixels, plan.pixels_of_part));
  return plan;
}

constexpr int kReduceThreads = 256;
constexpr int kReduceRows = kReduceThreads / kWarpSize;

// A block owns 32 neighbours of [K, N]. Warp w adds parts w, w + 8, ..., and the first warp adds the warps' sums: one
// order, whatever the launch. Rounds once, and writes to the result's layout.
template <typename scalar_t>
__global__ void __launch_bounds__(kReduceThreads)
    conv2d_backward_weight_sum_kernel(const BackwardWeightParams p, const WeightPlan plan) {
  using T = opmath_t<scalar_t>;
  SIMT_SHARED(T[kReduceRows][kWarpSize], sums);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t count = p.K * plan.N, i = int64_t(blockIdx.x) * kWarpSize + lane;
  T sum = T(0);
  if (i < count) {
    const T* const parts = static_cast<const T*>(p.workspace) + i;
#pragma unroll 4
    for (int64_t part = warp; part < plan.parts; part += kReduceRows) sum += __ldg(parts + part * count);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= count) return;
#pragma unroll
  for (int w = 1; w < kReduceRows; ++w) sum += sums[w][lane];
  const int64_t channels = p.C / p.groups, k = i / plan.N, n = i % plan.N;
  const int64_t c = n % channels, s = n / channels % p.S, r = n / channels / p.S;
  const int64_t at = k * p.grad_weight_stride[0] + c * p.grad_weight_stride[1] + r * p.grad_weight_stride[2] +
                     s * p.grad_weight_stride[3];
  static_cast<scalar_t*>(p.grad_weight)[at] = from_opmath<scalar_t>(sum);
}

template <typename scalar_t>
void run_vectors(const BackwardWeightParams& p, const WeightPlan& plan, Stream stream) {
  constexpr bool kHalf = sizeof(scalar_t) == 2;
  if constexpr (kHalf || std::is_same_v<scalar_t, float>) {
    if (plan.tensor_cores) {
      return plan.large ? launch_backward_weight<scalar_t, true, true, false, false>(p, plan, stream)
                        : launch_backward_weight<scalar_t, true, false, false, false>(p, plan, stream);
    }
  }
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (plan.large) return launch_backward_weight<scalar_t, false, true, false, false>(p, plan, stream);
  }
  if constexpr (!kHalf) launch_backward_weight<scalar_t, false, false, false, false>(p, plan, stream);
}

int64_t padded(int64_t output, int64_t stride, int64_t dilation, int64_t taps) {
  return (output - 1) * stride + dilation * (taps - 1);
}

void check_coordinates(const BackwardWeightParams& p) {
  const int64_t most = max_of(max_of(padded(p.OH, p.stride[0], p.dilation[0], p.R), p.H),
                              max_of(padded(p.OW, p.stride[1], p.dilation[1], p.S), p.W));
  if (max_of(most, max_of(p.padding_top, p.padding_left)) >= kMostCoordinate) {
    throw std::runtime_error("_conv2d_backward_weight: expected padded rows and columns to be below 2^30, but got " +
                             std::to_string(most));
  }
}

}  // namespace

void backward_weight(const BackwardWeightParams& p, Stream stream) {
  if (is_depthwise(p)) return backward_weight_depthwise(p, stream);
  check_coordinates(p);
  const WeightPlan plan = plan_of(p);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    if (plan.vector_input) {
      run_vectors<scalar_t>(p, plan, stream);
    } else {
      backward_weight_gathered(p, plan, stream);
    }
    if (plan.parts == 1) return;
    const int64_t blocks = ceil_div(p.K * plan.N, int64_t(kWarpSize));
    launch(conv2d_backward_weight_sum_kernel<scalar_t>,
           {dim3(grid_of("_conv2d_backward_weight", blocks)), dim3(kReduceThreads), 0, stream}, p, plan);
  });
}

// The tiles of [parts, K, N], in float32 or float64.
int64_t workspace_bytes(const BackwardWeightParams& p) {
  if (is_depthwise(p)) return depthwise_workspace_bytes(p);
  const WeightPlan plan = plan_of(p);
  return plan.parts > 1 ? plan.parts * p.K * plan.N * (p.dtype == DType::kFloat64 ? 8 : 4) : 0;
}

}  // namespace pvk::conv2d
