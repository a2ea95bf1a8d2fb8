// Attention on CUDA: what is before and after the kernels of products.
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "ops/attention/cuda_kernels.h"
#include "ops/attention/scores.cuh"

namespace pvk::attention {
namespace {

constexpr int kBlockThreads = 256;

dim3 grid_for(int64_t count, int64_t of_block) {
  return dim3(grid_of("attention", ceil_div(count, of_block)));
}

// Of a row of delta.
template <typename scalar_t>
constexpr int kDeltaThreads = kIsHalf<scalar_t> ? kWarpSize : 1;

template <typename bias_t>
PVK_DEVICE bool is_masked(bias_t bias) {
  if constexpr (std::is_same_v<bias_t, uint8_t>) {
    return bias == 0;
  } else {
    return to_opmath(bias) == minus_infinity<opmath_t<bias_t>>();
  }
}

// A thread owns a key of a head of the bias: whether the bias or the window masks it for every query.
template <typename bias_t>
__global__ void __launch_bounds__(kBlockThreads)
    attention_absent_kernel(const __grid_constant__ AttentionParams p, uint8_t* absent, int64_t count) {
  const int64_t index = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t heads = p.bias_stride[1] == 0 ? 1 : p.H, head = index / p.S, j = index % p.S;
  const bias_t* const bias = static_cast<const bias_t*>(p.bias) + head / heads * p.bias_stride[0] +
                             head % heads * p.bias_stride[1] + j * p.bias_stride[3];
  const int64_t begin = max_of(j - p.right, int64_t(0));
  int64_t end = min_of(j + p.left + 1, p.L);
  if (p.bias_stride[2] == 0) end = min_of(end, begin + 1);
  bool is_absent = true;
  for (int64_t i = begin; i < end && is_absent; ++i) is_absent = is_masked(__ldg(bias + i * p.bias_stride[2]));
  absent[index] = is_absent;
}

// f.operator()<bias_t>()
template <typename F>
void dispatch_bias(const AttentionParams& p, const F& f) {
  if (p.bias_kind == BiasKind::kBool) return f.template operator()<uint8_t>();
  if (p.bias_kind == BiasKind::kAddedFloat) return f.template operator()<float>();
  dispatch_dtype(p.dtype, f);
}

void find_absent(const AttentionParams& p, void* absent, Stream stream) {
  const int64_t count = absent_bytes(p);
  if (count == 0) return;
  dispatch_bias(p, [&]<typename bias_t>() {
    launch(attention_absent_kernel<bias_t>, {grid_for(count, kBlockThreads), dim3(kBlockThreads), 0, stream}, p,
           static_cast<uint8_t*>(absent), count);
  });
}

// delta = dot(grad_output, output) - grad_lse: a thread owns a row, and sums as the products of scores do, so that of a
// single key no rounding is left in its difference to dot(grad_output, value); a warp does of 16-bit types.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads)
    attention_delta_kernel(const __grid_constant__ AttentionBackwardParams p, opmath_t<scalar_t>* delta) {
  using T = opmath_t<scalar_t>;
  constexpr int kThreads = kDeltaThreads<scalar_t>;
  const AttentionParams& f = p.forward;
  const int lane = int(threadIdx.x) % kThreads;
  const int64_t row = int64_t(blockIdx.x) * (kBlockThreads / kThreads) + threadIdx.x / kThreads;
  if (row >= f.B * f.H * f.L) return;
  const int64_t head = row / f.L, i = row % f.L;
  const Rows<scalar_t> grads(p.grad_output, p.grad_output_stride, head / f.H, head % f.H, f.E);
  const Rows<scalar_t> outputs(f.output, f.output_stride, head / f.H, head % f.H, f.E);
  T sums[2] = {};
  const auto add = [&](int e, T& sum) {
    if (e < grads.features) {
      sum = fma(to_opmath(__ldg(grads.data + i * grads.stride + e)),
                to_opmath(__ldg(outputs.data + i * outputs.stride + e)), sum);
    }
  };
  for (int e = lane; e < grads.features; e += 2 * kThreads) {
    add(e, sums[0]);
    add(e + kThreads, sums[1]);
  }
  T sum = sums[0] + sums[1];
#pragma unroll
  for (int mask = kThreads / 2; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  if (lane == 0) delta[row] = p.grad_lse == nullptr ? sum : sum - __ldg(static_cast<const T*>(p.grad_lse) + row);
}

// grad_bias = its parts, in their order.
template <typename bias_t>
__global__ void __launch_bounds__(kBlockThreads)
    attention_bias_parts_kernel(const opmath_t<bias_t>* partials, bias_t* grad_bias, int64_t parts, int64_t count) {
  const int64_t index = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (index >= count) return;
  opmath_t<bias_t> sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += __ldg(partials + part * count + index);
  grad_bias[index] = from_opmath<bias_t>(sum);
}

int64_t bias_count(const AttentionBackwardParams& p) {
  return p.bias_size[0] * p.bias_size[1] * p.bias_size[2] * p.bias_size[3];
}

// Where the parts of the backward's scratch lie, in bytes.
struct BackwardScratch {
  int64_t absent, partials, end, parts;

  template <typename scalar_t>
  static BackwardScratch of(const AttentionBackwardParams& p) {
    constexpr int64_t kBytes = sizeof(opmath_t<scalar_t>), kAlign = 16;
    const AttentionParams& f = p.forward;
    BackwardScratch scratch;
    scratch.parts = p.grad_bias == nullptr ? 0 : Kernels<scalar_t>::bias_parts(p);
    scratch.absent = f.B * f.H * f.L * kBytes;
    scratch.partials = ceil_div(scratch.absent + absent_bytes(f), kAlign) * kAlign;
    scratch.end = scratch.partials + (scratch.parts > 1 ? scratch.parts * bias_count(p) * kBytes : 0);
    return scratch;
  }
};

template <typename scalar_t>
void run_backward(const AttentionBackwardParams& p, Stream stream) {
  using T = opmath_t<scalar_t>;
  const AttentionParams& f = p.forward;
  const auto places = BackwardScratch::of<scalar_t>(p);
  uint8_t* const scratch = static_cast<uint8_t*>(p.scratch);
  T* const delta = reinterpret_cast<T*>(scratch);
  launch(attention_delta_kernel<scalar_t>,
         {grid_for(f.B * f.H * f.L, kBlockThreads / kDeltaThreads<scalar_t>), dim3(kBlockThreads), 0, stream}, p,
         delta);
  find_absent(f, scratch + places.absent, stream);
  const BackwardCall call = {p, delta, scratch + places.absent, scratch + places.partials, places.parts};
  Kernels<scalar_t>::backward_key(call, stream);
  Kernels<scalar_t>::backward_query(call, stream);
  if (places.parts == 0) return;
  Kernels<scalar_t>::backward_bias(call, stream);
  if (places.parts == 1) return;
  dispatch_bias(f, [&]<typename bias_t>() {
    if constexpr (std::is_same_v<opmath_t<bias_t>, T>) {
      launch(attention_bias_parts_kernel<bias_t>,
             {grid_for(bias_count(p), kBlockThreads), dim3(kBlockThreads), 0, stream},
             static_cast<const T*>(call.partials), static_cast<bias_t*>(p.grad_bias), places.parts, bias_count(p));
    }
  });
}

}  // namespace

int64_t forward_scratch(const AttentionParams& p) {
  return absent_bytes(p);
}

int64_t backward_scratch(const AttentionBackwardParams& p) {
  int64_t bytes = 0;
  dispatch_dtype(p.forward.dtype, [&]<typename scalar_t>() { bytes = BackwardScratch::of<scalar_t>(p).end; });
  return bytes;
}

void forward(const AttentionParams& p, Stream stream) {
  find_absent(p, p.scratch, stream);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() { Kernels<scalar_t>::forward(p, stream); });
}

void backward(const AttentionBackwardParams& p, Stream stream) {
  dispatch_dtype(p.forward.dtype, [&]<typename scalar_t>() { run_backward<scalar_t>(p, stream); });
}

}  // namespace pvk::attention
