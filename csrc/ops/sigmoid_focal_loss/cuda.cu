// Sigmoid focal loss on CUDA: one pass forward, one backward, 16 bytes of each operand at a time.
#include "core/activation.cuh"
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/sigmoid_focal_loss/sigmoid_focal_loss.h"

namespace pvk::sigmoid_focal_loss {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kWarps = kBlockThreads / kWarpSize;
constexpr int kVectorsPerThread = 4;  // of a reduction, before it has fewer than kPartials blocks

PVK_DEVICE float log1p_of(float x) {
  return log1pf(x);
}
PVK_DEVICE double log1p_of(double x) {
  return log1p(x);
}
PVK_DEVICE float sqrt_of(float x) {
  return sqrtf(x);
}
PVK_DEVICE double sqrt_of(double x) {
  return sqrt(x);
}
PVK_DEVICE float pow_of(float x, float y) {
  return powf(x, y);
}
PVK_DEVICE double pow_of(double x, double y) {
  return pow(x, y);
}

// missed^gamma, and gamma * missed^(gamma - 1). `halves`: half_powers(gamma), the same for all threads.
template <typename T>
PVK_DEVICE void power_of(T missed, T gamma, int halves, T& power, T& less) {
  if (halves == 4) {
    power = missed * missed;
    less = missed + missed;
  } else if (halves == 0) {
    power = T(1);
    less = T(0);
  } else if (halves == 1) {
    power = sqrt_of(missed);
    less = missed == T(0) ? T(0) : gamma / power;
  } else if (halves > 1) {
    T product = halves % 2 ? sqrt_of(missed) : T(1), square = missed;
    for (int n = halves / 2 - 1; n > 0; n /= 2) {
      if (n % 2) product *= square;
      square *= square;
    }
    power = product * missed;
    less = product * gamma;
  } else {
    power = pow_of(missed, gamma);
    less = missed == T(0) ? T(0) : power / missed * gamma;
  }
}

template <typename T>
PVK_DEVICE FocalTerms<T, T> terms_of(T x, T target, T alpha) {
  const T magnitude = x < T(0) ? -x : x, e = exp_of(-magnitude);
  return {x, target, magnitude, e, log1p_of(e), alpha};
}

template <typename scalar_t, typename T>
PVK_DEVICE T loss_of(const SigmoidFocalLossParams& p, scalar_t x, scalar_t target, int halves) {
  const auto terms = terms_of<T>(to_opmath(x), to_opmath(target), T(p.alpha));
  T power, less;
  power_of(terms.missed, T(p.gamma), halves, power, less);
  return terms.loss(power);
}

// VEC elements, of which the last ones may not be there.
template <int VEC, typename scalar_t>
PVK_DEVICE VecN<scalar_t, VEC> load_some(const void* data, int64_t i, int64_t count) {
  const scalar_t* const source = static_cast<const scalar_t*>(data) + i;
  if (i + VEC <= count) return load_vec<VEC>(source);
  VecN<scalar_t, VEC> some = {};
#pragma unroll
  for (int e = 0; e < VEC; ++e)
    if (i + e < count) some.data[e] = __ldg(source + e);
  return some;
}

template <int VEC, typename scalar_t>
PVK_DEVICE void store_some(void* data, int64_t i, int64_t count, const VecN<scalar_t, VEC>& value) {
  scalar_t* const target = static_cast<scalar_t*>(data) + i;
  if (i + VEC <= count) return store_vec(target, value);
#pragma unroll
  for (int e = 0; e < VEC; ++e)
    if (i + e < count) target[e] = value.data[e];
}

// A thread owns VEC neighbouring elements at a time. One rounding, to scalar_t.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads)
    sigmoid_focal_loss_forward_kernel(const __grid_constant__ SigmoidFocalLossParams p, int halves) {
  using T = opmath_t<scalar_t>;
  const int64_t step = int64_t(gridDim.x) * kBlockThreads * VEC;
  for (int64_t i = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) * VEC; i < p.count; i += step) {
    const auto x = load_some<VEC, scalar_t>(p.inputs, i, p.count);
    const auto target = load_some<VEC, scalar_t>(p.targets, i, p.count);
    VecN<scalar_t, VEC> loss;
#pragma unroll
    for (int e = 0; e < VEC; ++e)
      loss.data[e] = from_opmath<scalar_t>(loss_of<scalar_t, T>(p, x.data[e], target.data[e], halves));
    store_some(p.loss, i, p.count, loss);
  }
}

// The sum over a block, in one order, for thread 0.
PVK_DEVICE double sum_of_block(double value) {
  SIMT_SHARED(double[kWarps], sums);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) total += sums[w];
  return total;
}

// partials[block] = the sum of the elements that a forward without reduction gives to the block; the grid depends on
// the count alone. A thread adds in opmath_t, one chain for each of its VEC elements, all else is in double.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads)
    sigmoid_focal_loss_partials_kernel(const __grid_constant__ SigmoidFocalLossParams p, int halves) {
  using T = opmath_t<scalar_t>;
  const int64_t step = int64_t(gridDim.x) * kBlockThreads * VEC;
  T sum[VEC] = {};
  for (int64_t i = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) * VEC; i < p.count; i += step) {
    const auto x = load_some<VEC, scalar_t>(p.inputs, i, p.count);
    const auto target = load_some<VEC, scalar_t>(p.targets, i, p.count);
#pragma unroll
    for (int e = 0; e < VEC; ++e)
      if (i + e < p.count) sum[e] += loss_of<scalar_t, T>(p, x.data[e], target.data[e], halves);
  }
  double total = 0;
#pragma unroll
  for (int e = 0; e < VEC; ++e) total += double(sum[e]);
  total = sum_of_block(total);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = total;
}

// One block sums the partials.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads)
    sigmoid_focal_loss_total_kernel(const __grid_constant__ SigmoidFocalLossParams p, int partials) {
  double total = 0;
  for (int i = threadIdx.x; i < partials; i += kBlockThreads) total += p.partials[i];
  total = sum_of_block(total);
  if (p.reduction == Reduction::kMean) total /= double(p.count);
  if (threadIdx.x == 0) *static_cast<scalar_t*>(p.loss) = from_opmath<scalar_t>(opmath_t<scalar_t>(total));
}

// A thread owns VEC neighbouring elements at a time. One rounding, to scalar_t.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads)
    sigmoid_focal_loss_backward_kernel(const __grid_constant__ SigmoidFocalLossParams p, int halves) {
  using T = opmath_t<scalar_t>;
  const scalar_t* const grad = static_cast<const scalar_t*>(p.grad);
  const T scale = p.reduction == Reduction::kMean ? T(1.0 / double(p.count)) : T(1);
  const T single = p.grad_is_single ? to_opmath(__ldg(grad)) : T(0);
  const int64_t step = int64_t(gridDim.x) * kBlockThreads * VEC;
  for (int64_t i = (int64_t(blockIdx.x) * kBlockThreads + threadIdx.x) * VEC; i < p.count; i += step) {
    const auto x = load_some<VEC, scalar_t>(p.inputs, i, p.count);
    const auto target = load_some<VEC, scalar_t>(p.targets, i, p.count);
    VecN<scalar_t, VEC> upstream = {};
    if (!p.grad_is_single) upstream = load_some<VEC, scalar_t>(grad, i, p.count);
    VecN<scalar_t, VEC> by_input, by_target;
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
      const auto terms = terms_of<T>(to_opmath(x.data[e]), to_opmath(target.data[e]), T(p.alpha));
      const T factor = (p.grad_is_single ? single : to_opmath(upstream.data[e])) * scale;
      T power, less;
      power_of(terms.missed, T(p.gamma), halves, power, less);
      by_input.data[e] = from_opmath<scalar_t>(factor * terms.by_input(power, less));
      by_target.data[e] = from_opmath<scalar_t>(factor * terms.by_target(power, less, T(p.alpha)));
    }
    if (p.grad_inputs != nullptr) store_some(p.grad_inputs, i, p.count, by_input);
    if (p.grad_targets != nullptr) store_some(p.grad_targets, i, p.count, by_target);
  }
}

// Whether all that a kernel reads and writes goes by 16 bytes; nullptr does.
template <typename... Pointers>
bool allows_vectors(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <typename scalar_t, int VEC>
void forward_typed(const SigmoidFocalLossParams& p, int halves, Stream stream) {
  constexpr int64_t kStep = kBlockThreads * VEC;
  const dim3 block(kBlockThreads);
  if (p.reduction == Reduction::kNone) {
    const dim3 grid(unsigned(min_of(ceil_div(p.count, kStep), int64_t(2147483647))));
    return launch(sigmoid_focal_loss_forward_kernel<scalar_t, VEC>, {grid, block, 0, stream}, p, halves);
  }
  const int64_t partials = min_of(ceil_div(p.count, kStep * kVectorsPerThread), kPartials);
  if (partials > 0) {
    launch(sigmoid_focal_loss_partials_kernel<scalar_t, VEC>, {dim3(unsigned(partials)), block, 0, stream}, p, halves);
  }
  launch(sigmoid_focal_loss_total_kernel<scalar_t>, {dim3(1), block, 0, stream}, p, int(partials));
}

template <typename scalar_t, int VEC>
void backward_typed(const SigmoidFocalLossParams& p, int halves, Stream stream) {
  const dim3 grid(unsigned(min_of(ceil_div(p.count, int64_t(kBlockThreads * VEC)), int64_t(2147483647))));
  launch(sigmoid_focal_loss_backward_kernel<scalar_t, VEC>, {grid, dim3(kBlockThreads), 0, stream}, p, halves);
}

}  // namespace

void forward(const SigmoidFocalLossParams& p, Stream stream) {
  if (p.count == 0 && p.reduction == Reduction::kNone) return;
  const int halves = half_powers(p.gamma);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const void* const written = p.reduction == Reduction::kNone ? p.loss : nullptr;
    if (allows_vectors(p.inputs, p.targets, written)) {
      forward_typed<scalar_t, kVec16<scalar_t>>(p, halves, stream);
    } else {
      forward_typed<scalar_t, 1>(p, halves, stream);
    }
  });
}

void backward(const SigmoidFocalLossParams& p, Stream stream) {
  if (p.count == 0 || (p.grad_inputs == nullptr && p.grad_targets == nullptr)) return;
  const int halves = half_powers(p.gamma);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    const void* const grad = p.grad_is_single ? nullptr : p.grad;
    if (allows_vectors(p.inputs, p.targets, grad, p.grad_inputs, p.grad_targets)) {
      backward_typed<scalar_t, kVec16<scalar_t>>(p, halves, stream);
    } else {
      backward_typed<scalar_t, 1>(p, halves, stream);
    }
  });
}

}  // namespace pvk::sigmoid_focal_loss
