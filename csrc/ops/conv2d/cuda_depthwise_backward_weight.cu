// The gradient of a depthwise convolution with respect to its weight, on CUDA: parts of the pixels are summed into a
// workspace, and the parts of an element then added in their order. No atomics.
#include "core/dispatch.cuh"
#include "ops/conv2d/depthwise.cuh"

namespace pvk::conv2d {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kReduceElements = 32, kReduceGroups = 8;
constexpr int kOutputs = 4;  // of a row, that a thread multiplies at a time

enum class Kind { kVectors, kPairs, kPlanes, kGeneral };

// How a launch is cut. A unit is a segment of a row of outputs of an image, or a strip of a plane of an image.
struct WeightPlan {
  Kind kind;
  int64_t parts;  // of the units, each with a sum of its own in the workspace
  int64_t units;
  int64_t per_part;    // units
  int64_t segments;    // of a row
  int64_t length;      // of a segment
  int64_t strips_w;    // strips in a row of them, where units are strips
  int64_t strips;      // in a plane
  int64_t chunks;      // of channels
  int64_t multiplier;  // outputs of an input
  int lanes, slots;    // of a block: vectors of channels, units at a time
  bool taps_first;     // in the workspace: [parts, K, taps], else [parts, taps, K]
};

template <int VEC, typename T>
PVK_DEVICE void store_floats(T* address, const T (&value)[VEC]) {
  constexpr int kPart = VEC % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int e = 0; e < VEC; e += kPart) {
    VecN<T, kPart> part;
#pragma unroll
    for (int i = 0; i < kPart; ++i) part.data[i] = value[e + i];
    store_vec(address + e, part);
  }
}

// ---- channels_last ----

// Adds what the pixels of a unit give for row r of the taps. kCareful: pixel by pixel, without those beyond the map.
template <typename scalar_t, int VEC, int K, int STEP, bool kCareful>
PVK_DEVICE void add_segment(const BackwardWeightParams& p, const WeightPlan& plan, int64_t unit, int64_t k, int r,
                            float (&sum)[K][VEC]) {
  constexpr int kWindow = (kOutputs - 1) * STEP + K;
  const int64_t row = quotient(unit, plan.segments), n = quotient(row, p.OH);
  const int oh = int(row - n * p.OH), h = oh * STEP - int(p.padding_top) + r, W = int(p.W);
  if (h < 0 || h >= p.H) return;
  const int begin = int((unit - row * plan.segments) * plan.length);
  const int end = int(min_of(begin + plan.length, p.OW));
  const scalar_t* const x = static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] + h * p.input_stride[2] + k;
  const scalar_t* const g =
      static_cast<const scalar_t*>(p.grad_output) + n * p.grad_output_stride[0] + oh * p.grad_output_stride[2] + k;
  constexpr int kAtOnce = kCareful ? 1 : kOutputs;
#pragma unroll 1
  for (int ow = begin; ow < end; ow += kAtOnce) {
    const int left = ow * STEP - int(p.padding_left);
    if constexpr (kCareful) {
      const auto grad = load_vec<VEC>(g + ow * p.grad_output_stride[3]);
#pragma unroll
      for (int s = 0; s < K; ++s) {
        if (left + s < 0 || left + s >= W) continue;
        const auto pixel = load_vec<VEC>(x + (left + s) * p.input_stride[3]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum[s][e] = fma(to_opmath(pixel.data[e]), to_opmath(grad.data[e]), sum[s][e]);
      }
    } else {
      VecN<scalar_t, VEC> window[kWindow], grad[kOutputs];
#pragma unroll
      for (int j = 0; j < kOutputs; ++j) {
        grad[j] = {};
        if (ow + j < end) grad[j] = load_vec<VEC>(g + (ow + j) * p.grad_output_stride[3]);
      }
#pragma unroll
      for (int c = 0; c < kWindow; ++c) {
        const int w = left + c;
        window[c] = {};
        if (w >= 0 && w < W) window[c] = load_vec<VEC>(x + w * p.input_stride[3]);
      }
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
#pragma unroll
        for (int s = 0; s < K; ++s) {
#pragma unroll
          for (int j = 0; j < kOutputs; ++j)
            sum[s][e] = fma(to_opmath(window[j * STEP + s].data[e]), to_opmath(grad[j].data[e]), sum[s][e]);
        }
      }
    }
  }
}

// A thread owns VEC channels and one row of K taps, and has every slots-th unit of its block's part; the slots of a
// block add up one after another. channels_last; float32. The rows of taps of a unit are neighbours, so that L1 serves
// the pixels that they share. Partial sums are [parts, taps, K].
template <typename scalar_t, int VEC, int K, int STEP>
__global__ void __launch_bounds__(kBlockThreads, K* STEP == 3 ? 2 : 1)
    conv2d_depthwise_weight_channels_kernel(const __grid_constant__ BackwardWeightParams p,
                                            const __grid_constant__ WeightPlan plan) {
  SIMT_DYN_SHARED(float, sums);  // [K * K, lanes, VEC]
  const int lane = int(threadIdx.x) % plan.lanes, rest = int(threadIdx.x) / plan.lanes;
  const int r = rest % K, slot = rest / K;
  const int64_t k = (int64_t(blockIdx.x) % plan.chunks * plan.lanes + lane) * VEC;
  const int64_t part = int64_t(blockIdx.x) / plan.chunks;
  const int64_t first = part * plan.per_part, last = min_of(first + plan.per_part, plan.units);
  const bool works = k < p.K && slot < plan.slots;
  float sum[K][VEC];
  const auto clear = [&] {
#pragma unroll
    for (int s = 0; s < K; ++s) {
#pragma unroll
      for (int e = 0; e < VEC; ++e) sum[s][e] = 0.0f;
    }
  };
  clear();
  if (works) {
#pragma unroll 1
    for (int64_t unit = first + slot; unit < last; unit += plan.slots)
      add_segment<scalar_t, VEC, K, STEP, false>(p, plan, unit, k, r, sum);
    bool finite = true;
#pragma unroll
    for (int s = 0; s < K; ++s) finite = finite && all_finite(sum[s]);
    if (!finite) {
      clear();
#pragma unroll 1
      for (int64_t unit = first + slot; unit < last; unit += plan.slots)
        add_segment<scalar_t, VEC, K, STEP, true>(p, plan, unit, k, r, sum);
    }
  }
#pragma unroll 1
  for (int turn = 0; turn < plan.slots; ++turn) {
    if (works && slot == turn) {
#pragma unroll
      for (int s = 0; s < K; ++s) {
        float* const shared = sums + ((r * K + s) * plan.lanes + lane) * VEC;
        if (turn > 0) {
#pragma unroll
          for (int e = 0; e < VEC; ++e) sum[s][e] += shared[e];
        }
        if (turn + 1 < plan.slots) {
          store_floats<VEC>(shared, sum[s]);
        } else {
          store_floats<VEC>(static_cast<float*>(p.workspace) + (part * K * K + r * K + s) * p.K + k, sum[s]);
        }
      }
    }
    __syncthreads();
  }
}

// ---- planes ----

// Adds what a strip of outputs gives. kCareful: output by output, without pixels beyond the map.
template <typename scalar_t, int K, int STEP, bool kCareful>
PVK_DEVICE void add_strip(const BackwardWeightParams& p, const WeightPlan& plan, int64_t unit, int64_t k,
                          float (&sum)[K * K]) {
  constexpr int kPlaneRows = plane_rows(K, STEP);
  using Rows = Window<K, STEP, 1, kPlaneRows>;
  using Columns = Window<K, STEP, 1, kPlaneColumns>;
  const int64_t n = quotient(unit, plan.strips), strip = unit - n * plan.strips, band = quotient(strip, plan.strips_w);
  const int oh0 = int(band) * kPlaneRows, ow0 = int(strip - band * plan.strips_w) * kPlaneColumns;
  const int top = oh0 * STEP - int(p.padding_top), left = ow0 * STEP - int(p.padding_left);
  const int H = int(p.H), W = int(p.W);
  const scalar_t* const x =
      static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] + quotient(k, plan.multiplier) * p.input_stride[1];
  const scalar_t* const g =
      static_cast<const scalar_t*>(p.grad_output) + n * p.grad_output_stride[0] + k * p.grad_output_stride[1];
  const auto pixel = [&](int h, int w) {
    return h >= 0 && h < H && w >= 0 && w < W ? to_opmath(__ldg(x + h * p.input_stride[2] + w * p.input_stride[3]))
                                              : 0.0f;
  };
  const auto gradient = [&](int i, int j) {
    const int oh = oh0 + i, ow = ow0 + j;
    return oh < p.OH && ow < p.OW ? to_opmath(__ldg(g + oh * p.grad_output_stride[2] + ow * p.grad_output_stride[3]))
                                  : 0.0f;
  };
  if constexpr (kCareful) {
#pragma unroll 1
    for (int o = 0; o < kPlaneRows * kPlaneColumns; ++o) {
      const int i = o / kPlaneColumns, j = o % kPlaneColumns;
      if (oh0 + i >= p.OH || ow0 + j >= p.OW) continue;
      const float grad = gradient(i, j);
#pragma unroll
      for (int t = 0; t < K * K; ++t) {
        const int h = top + i * STEP + t / K, w = left + j * STEP + t % K;
        if (h >= 0 && h < H && w >= 0 && w < W) sum[t] = fma(pixel(h, w), grad, sum[t]);
      }
    }
  } else {
    float grad[kPlaneRows][kPlaneColumns];
#pragma unroll
    for (int i = 0; i < kPlaneRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPlaneColumns; ++j) grad[i][j] = gradient(i, j);
    }
#pragma unroll
    for (int y = 0; y < Rows::kSize; ++y) {
      float window[Columns::kSize];
#pragma unroll
      for (int c = 0; c < Columns::kSize; ++c) window[c] = pixel(top + y, left + c);
#pragma unroll
      for (int i = 0; i < kPlaneRows; ++i) {
        const int r = y - i * STEP;
        if (r < 0 || r >= K) continue;
#pragma unroll
        for (int s = 0; s < K; ++s) {
#pragma unroll
          for (int j = 0; j < kPlaneColumns; ++j)
            sum[r * K + s] = fma(window[j * STEP + s], grad[i][j], sum[r * K + s]);
        }
      }
    }
  }
}

// A block owns the taps of one plane of outputs and a part of its strips in all images; a thread has every 128th of
// them, and all taps in registers. Any strides; float32. The block adds its threads up by shuffles, in a fixed order.
// Partial sums are [parts, K, taps].
template <typename scalar_t, int K, int STEP>
__global__ void __launch_bounds__(kPlaneThreads, plane_blocks(K))
    conv2d_depthwise_weight_planes_kernel(const __grid_constant__ BackwardWeightParams p,
                                          const __grid_constant__ WeightPlan plan) {
  const int64_t k = int64_t(blockIdx.x) % p.K, part = int64_t(blockIdx.x) / p.K;
  const int64_t first = part * plan.per_part, last = min_of(first + plan.per_part, plan.units);
  float sum[K * K];
#pragma unroll
  for (int t = 0; t < K * K; ++t) sum[t] = 0.0f;
#pragma unroll 1
  for (int64_t unit = first + threadIdx.x; unit < last; unit += kPlaneThreads)
    add_strip<scalar_t, K, STEP, false>(p, plan, unit, k, sum);
  if (!all_finite(sum)) {
#pragma unroll
    for (int t = 0; t < K * K; ++t) sum[t] = 0.0f;
#pragma unroll 1
    for (int64_t unit = first + threadIdx.x; unit < last; unit += kPlaneThreads)
      add_strip<scalar_t, K, STEP, true>(p, plan, unit, k, sum);
  }
  sum_of_group<kPlaneThreads>(sum);
#pragma unroll
  for (int t = 0; t < K * K; ++t)
    if (int(threadIdx.x) == t) static_cast<float*>(p.workspace)[(part * p.K + k) * K * K + t] = sum[t];
}

// ---- all else ----

// A thread owns one element of the weight and a part of the rows of outputs; neighbours are taps of a channel, or in
// channels_last channels. Any strides; float32, or float64.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 3)
    conv2d_depthwise_weight_kernel(const __grid_constant__ BackwardWeightParams p,
                                   const __grid_constant__ WeightPlan plan) {
  using T = opmath_t<scalar_t>;
  const int64_t taps = p.R * p.S, elements = p.K * taps;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < elements * plan.parts;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t part = quotient(i, elements), element = i - part * elements;
    const int64_t outer = quotient(element, plan.taps_first ? taps : p.K);
    const int64_t inner = element - outer * (plan.taps_first ? taps : p.K);
    const int64_t k = plan.taps_first ? outer : inner, tap = plan.taps_first ? inner : outer;
    const int64_t r = quotient(tap, p.S), s = tap - r * p.S;
    const int64_t first = part * plan.per_part, last = min_of(first + plan.per_part, plan.units);
    T sum = T(0);
    for (int64_t row = first; row < last; ++row) {
      const int64_t n = quotient(row, p.OH), oh = row - n * p.OH;
      const int64_t h = oh * p.stride[0] - p.padding_top + r * p.dilation[0];
      if (h < 0 || h >= p.H) continue;
      const scalar_t* const x = static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] +
                                quotient(k, plan.multiplier) * p.input_stride[1] + h * p.input_stride[2];
      const scalar_t* const g = static_cast<const scalar_t*>(p.grad_output) + n * p.grad_output_stride[0] +
                                k * p.grad_output_stride[1] + oh * p.grad_output_stride[2];
      T along = T(0);  // a row apart: the rounding of long sums
      int64_t w = s * p.dilation[1] - p.padding_left;
      for (int64_t ow = 0; ow < p.OW && w < p.W; ++ow, w += p.stride[1]) {
        if (w < 0) continue;
        const scalar_t pixel = __ldg(x + w * p.input_stride[3]), grad = __ldg(g + ow * p.grad_output_stride[3]);
        along = fma(to_opmath(pixel), to_opmath(grad), along);
      }
      sum += along;
    }
    static_cast<T*>(p.workspace)[i] = sum;
  }
}

// A block owns 32 neighbouring elements of the workspace's [parts, elements]: 8 groups have every 8th part, and their
// sums are added in order. Neighbouring threads have neighbouring elements.
template <typename scalar_t>
__global__ void __launch_bounds__(kReduceElements* kReduceGroups)
    conv2d_depthwise_weight_reduce_kernel(const __grid_constant__ BackwardWeightParams p, int64_t parts,
                                          bool taps_first) {
  using T = opmath_t<scalar_t>;
  SIMT_SHARED(T[kReduceGroups][kReduceElements], sums);
  const int lane = int(threadIdx.x) % kReduceElements, group = int(threadIdx.x) / kReduceElements;
  const int64_t taps = p.R * p.S, elements = p.K * taps, i = int64_t(blockIdx.x) * kReduceElements + lane;
  T sum = T(0);
  if (i < elements) {
#pragma unroll 8
    for (int64_t part = group; part < parts; part += kReduceGroups)
      sum += static_cast<const T*>(p.workspace)[part * elements + i];
  }
  sums[group][lane] = sum;
  __syncthreads();
  if (group != 0 || i >= elements) return;
#pragma unroll
  for (int other = 1; other < kReduceGroups; ++other) sum += sums[other][lane];
  const int64_t k = taps_first ? i / taps : i % p.K, tap = taps_first ? i % taps : i / p.K;
  const int64_t at =
      k * p.grad_weight_stride[0] + tap / p.S * p.grad_weight_stride[2] + tap % p.S * p.grad_weight_stride[3];
  static_cast<scalar_t*>(p.grad_weight)[at] = from_opmath<scalar_t>(sum);
}

// ---- the choice ----

template <typename scalar_t, int VEC>
bool has_vectors(const BackwardWeightParams& p) {
  return p.K == p.C && has_channel_vectors<scalar_t, VEC>(p.input, p.input_stride, p.C) &&
         has_channel_vectors<scalar_t, VEC>(p.grad_output, p.grad_output_stride, p.K);
}

template <typename scalar_t>
WeightPlan plan_of(const BackwardWeightParams& p) {
  const int64_t rows = p.N * p.OH;
  WeightPlan plan{};
  const bool constant = constant_taps(p) != 0 && !std::is_same_v<scalar_t, double>;
  const bool channels = p.input_stride[1] == 1 && p.grad_output_stride[1] == 1;
  plan.kind = Kind::kGeneral;
  if (constant && has_vectors<scalar_t, kVec16<scalar_t>>(p)) {
    plan.kind = Kind::kVectors;
  } else if (constant && has_vectors<scalar_t, kPair>(p)) {
    plan.kind = Kind::kPairs;
  } else if (constant && !channels) {
    plan.kind = Kind::kPlanes;
  }
  plan.taps_first = !channels;
  plan.multiplier = p.K / p.C;
  switch (plan.kind) {
    case Kind::kVectors:
    case Kind::kPairs: {
      constexpr int64_t kBlocks = kMultiprocessors * 3;
      const int64_t vec = plan.kind == Kind::kPairs ? kPair : kVec16<scalar_t>;
      plan.lanes = int(even_part(p.C / vec, kLineBytes / (vec * int64_t(sizeof(scalar_t)))));
      plan.chunks = ceil_div(p.C / vec, int64_t(plan.lanes));
      plan.slots = int(kBlockThreads / (plan.lanes * p.R));
      // Few rows are cut into segments, so that a slot has several units: of 8 outputs at least.
      const int64_t wanted = ceil_div(kBlocks, plan.chunks) * plan.slots * 4;
      const int64_t pieces = min_of(ceil_div(wanted, max_of(rows, int64_t(1))), ceil_div(p.OW, int64_t(8)));
      plan.length = ceil_div(ceil_div(p.OW, pieces), int64_t(kOutputs)) * kOutputs;
      plan.segments = ceil_div(p.OW, plan.length);
      plan.units = rows * plan.segments;
      plan.slots = int(max_of(min_of(int64_t(plan.slots), plan.units), int64_t(1)));
      plan.parts = min_of(ceil_div(kBlocks, plan.chunks), ceil_div(plan.units, int64_t(plan.slots)));
      break;
    }
    case Kind::kPlanes:
      plan.strips_w = ceil_div(p.OW, int64_t(kPlaneColumns));
      plan.strips = plan.strips_w * ceil_div(p.OH, int64_t(plane_rows(int(p.R), int(p.stride[0]))));
      plan.units = p.N * plan.strips;
      plan.parts = min_of(ceil_div(int64_t(kMultiprocessors) * 8, p.K), ceil_div(plan.units, int64_t(kPlaneThreads)));
      break;
    case Kind::kGeneral:
      plan.units = rows;
      plan.parts = min_of(ceil_div(int64_t(kMultiprocessors) * 2048, p.K * p.R * p.S), plan.units);
      break;
  }
  plan.parts = max_of(plan.parts, int64_t(1));
  plan.per_part = ceil_div(plan.units, plan.parts);
  return plan;
}

template <typename scalar_t, int VEC, int K, int STEP>
void run_channels(const BackwardWeightParams& p, const WeightPlan& plan, Stream stream) {
  const int threads = ceil_div(plan.lanes * K * plan.slots, kWarpSize) * kWarpSize;
  const size_t shared = size_t(K * K * plan.lanes) * VEC * sizeof(float);
  launch(conv2d_depthwise_weight_channels_kernel<scalar_t, VEC, K, STEP>,
         {dim3(unsigned(plan.parts * plan.chunks)), dim3(unsigned(threads)), shared, stream}, p, plan);
}

template <typename scalar_t, int K, int STEP>
void run_constant(const BackwardWeightParams& p, const WeightPlan& plan, Stream stream) {
  if (plan.kind == Kind::kVectors) return run_channels<scalar_t, kVec16<scalar_t>, K, STEP>(p, plan, stream);
  if (plan.kind == Kind::kPairs) return run_channels<scalar_t, kPair, K, STEP>(p, plan, stream);
  launch(conv2d_depthwise_weight_planes_kernel<scalar_t, K, STEP>,
         {dim3(unsigned(plan.parts * p.K)), dim3(kPlaneThreads), 0, stream}, p, plan);
}

}  // namespace

void backward_weight_depthwise(const BackwardWeightParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const WeightPlan plan = plan_of<scalar_t>(p);
    const int64_t elements = p.K * p.R * p.S;
    if (plan.kind == Kind::kGeneral) {
      const int64_t blocks = min_of(ceil_div(elements * plan.parts, int64_t(kBlockThreads)), int64_t(1) << 20);
      launch(conv2d_depthwise_weight_kernel<scalar_t>, {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream}, p,
             plan);
    } else if constexpr (!std::is_same_v<scalar_t, double>) {
      dispatch_taps(int(p.R), [&]<int K>() {
        if (p.stride[0] == 1) return run_constant<scalar_t, K, 1>(p, plan, stream);
        run_constant<scalar_t, K, 2>(p, plan, stream);
      });
    }
    const int64_t blocks = ceil_div(elements, int64_t(kReduceElements));
    launch(conv2d_depthwise_weight_reduce_kernel<scalar_t>,
           {dim3(unsigned(blocks)), dim3(kReduceElements * kReduceGroups), 0, stream}, p, plan.parts, plan.taps_first);
  });
}

int64_t depthwise_workspace_bytes(const BackwardWeightParams& p) {
  int64_t bytes = 0;
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    bytes = plan_of<scalar_t>(p).parts * p.K * p.R * p.S * int64_t(sizeof(opmath_t<scalar_t>));
  });
  return bytes;
}

}  // namespace pvk::conv2d
