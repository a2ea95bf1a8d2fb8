// Losses of box regression on CUDA: a thread a pair. A reduced loss is summed by block, then by one last block, in one
// order.
#include <stdexcept>
#include <string>

#include "core/dispatch.cuh"
#include "core/launch.h"
#include "ops/box_iou/device_boxes.cuh"
#include "ops/generalized_box_iou_loss/generalized_box_iou_loss.h"

namespace pvk::generalized_box_iou_loss {
namespace {

using namespace pvk::box_iou;

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxGrid = 2147483647;

template <typename scalar_t, Kind kKind>
struct PairOfBoxes {
  using V = Rounded<opmath_t<scalar_t>>;
  V c1[4], c2[4];
  Box<V> a, b;

  PVK_DEVICE PairOfBoxes(const LossParams& p, int64_t i, const Constants<V>& constants) {
    load_coordinates<scalar_t>(p.boxes1, i * p.boxes1_stride[0], p.boxes1_stride[1], c1);
    load_coordinates<scalar_t>(p.boxes2, i * p.boxes2_stride[0], p.boxes2_stride[1], c2);
    a = prepare_box<kKind>(Format::kXyxy, c1, constants);
    b = prepare_box<kKind>(Format::kXyxy, c2, constants);
  }
};

// The sum over the block, in thread 0: lanes by halves, then warps in order.
PVK_DEVICE double sum_over_block(double value, double (&warps)[kWarps]) {
  for (int half = kWarpSize / 2; half > 0; half /= 2) value += shfl_xor(value, half);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kWarps; ++warp) total += warps[warp];
  return total;
}

// A thread owns a pair of boxes; the block's sum goes to scratch where the loss is reduced.
template <typename scalar_t, Kind kKind>
__global__ void __launch_bounds__(kThreads) box_iou_loss_forward_kernel(const __grid_constant__ LossParams p) {
  using T = opmath_t<scalar_t>;
  using V = Rounded<T>;
  SIMT_SHARED(double[kWarps], warps);
  const Constants<V> constants = box_iou::constants_of<T>(p.union_eps, p.enclosing_eps, p.alpha_eps);
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  T value = T(0);
  if (i < p.N) {
    const PairOfBoxes<scalar_t, kKind> pair(p, i, constants);
    value = Pair<kKind, true, V>(pair.a, pair.b, constants).value(constants).value;
  }
  if (p.reduction == Reduction::kNone) {
    if (i < p.N) static_cast<T*>(p.loss)[i] = value;
    return;
  }
  const double sum = sum_over_block(double(value), warps);
  if (threadIdx.x == 0) static_cast<double*>(p.scratch)[blockIdx.x] = sum;
}

// One block: each thread adds every 256th of the sums, then they are added as above.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    box_iou_loss_reduce_kernel(const __grid_constant__ LossParams p, int64_t blocks) {
  SIMT_SHARED(double[kWarps], warps);
  double value = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) value += static_cast<const double*>(p.scratch)[i];
  const double sum = sum_over_block(value, warps);
  if (threadIdx.x == 0)
    *static_cast<T*>(p.loss) = T(p.reduction == Reduction::kMean && p.N > 0 ? sum / double(p.N) : sum);
}

template <typename scalar_t>
PVK_DEVICE void store_gradient(void* target, int64_t i, const Rounded<opmath_t<scalar_t>> (&out)[4]) {
  VecN<scalar_t, 4> vec;
#pragma unroll
  for (int k = 0; k < 4; ++k) vec.data[k] = from_opmath<scalar_t>(out[k].value);
  if constexpr (sizeof(vec) == 16) {
    store_vec<4>(static_cast<scalar_t*>(target) + 4 * i, vec);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) static_cast<scalar_t*>(target)[4 * i + k] = vec.data[k];
  }
}

// A thread owns a pair of boxes and writes the gradients that are asked for. One rounding.
template <typename scalar_t, Kind kKind>
__global__ void __launch_bounds__(kThreads) box_iou_loss_backward_kernel(const __grid_constant__ LossParams p) {
  using T = opmath_t<scalar_t>;
  using V = Rounded<T>;
  const Constants<V> constants = box_iou::constants_of<T>(p.union_eps, p.enclosing_eps, p.alpha_eps);
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.N) return;
  V of_loss{static_cast<const T*>(p.grad)[i * p.grad_stride]};
  if (p.reduction == Reduction::kMean) of_loss = of_loss / V{T(p.N)};
  const PairOfBoxes<scalar_t, kKind> pair(p, i, constants);
  BoxGrad<V> grad_a, grad_b;
  Pair<kKind, true, V>(pair.a, pair.b, constants).gradient(pair.a, pair.b, constants, -of_loss, grad_a, grad_b);
  V out[4];
  if (p.grad1 != nullptr) {
    finish_gradient<kKind>(Format::kXyxy, pair.c1, grad_a, constants, out);
    store_gradient<scalar_t>(p.grad1, i, out);
  }
  if (p.grad2 != nullptr) {
    finish_gradient<kKind>(Format::kXyxy, pair.c2, grad_b, constants, out);
    store_gradient<scalar_t>(p.grad2, i, out);
  }
}

int64_t count_blocks(const LossParams& p) {
  const int64_t blocks = ceil_div(p.N, int64_t(kThreads));
  if (blocks > kMaxGrid)
    throw std::runtime_error("box_iou_loss: expected boxes1 to need at most 2147483647 blocks, but got " +
                             std::to_string(blocks));
  return blocks;
}

}  // namespace

int64_t scratch_bytes(const LossParams& p) {
  return p.reduction == Reduction::kNone ? 0 : count_blocks(p) * int64_t(sizeof(double));
}

void forward(const LossParams& p, Stream stream) {
  const int64_t blocks = count_blocks(p);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    if (blocks > 0) {
      dispatch_loss(p.kind, [&]<Kind kKind>() {
        launch(box_iou_loss_forward_kernel<scalar_t, kKind>, {dim3(unsigned(blocks)), dim3(kThreads), 0, stream}, p);
      });
    }
    if (p.reduction != Reduction::kNone)
      launch(box_iou_loss_reduce_kernel<opmath_t<scalar_t>>, {dim3(1), dim3(kThreads), 0, stream}, p, blocks);
  });
}

void backward(const LossParams& p, Stream stream) {
  const LaunchConfig config = {dim3(unsigned(count_blocks(p))), dim3(kThreads), 0, stream};
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    dispatch_loss(p.kind, [&]<Kind kKind>() { launch(box_iou_loss_backward_kernel<scalar_t, kKind>, config, p); });
  });
}

}  // namespace pvk::generalized_box_iou_loss
