// Attention on CUDA: what is before and after the kernels of products.
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "ops/attention/cuda_kernels.h"
#include "ops/attention/scores.cuh"

namespace pvk::attention {
namespace {

constexpr int kBlockThreads = 256;

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
    launch(attention_absent_kernel<bias_t>,
           {dim3(grid_of("attention", ceil_div(count, int64_t(kBlockThreads)))), dim3(kBlockThreads), 0, stream}, p,
           static_cast<uint8_t*>(absent), count);
  });
}

}  // namespace

int64_t forward_scratch(const AttentionParams& p) {
  return absent_bytes(p);
}

void forward(const AttentionParams& p, Stream stream) {
  find_absent(p, p.scratch, stream);
  switch (p.dtype) {
    case DType::kFloat16:
      return forward_float16(p, stream);
    case DType::kBFloat16:
      return forward_bfloat16(p, stream);
    case DType::kFloat32:
      return forward_float32(p, stream);
    case DType::kFloat64:
      return forward_float64(p, stream);
  }
}

int64_t backward_scratch(const AttentionBackwardParams&) {
  return 0;
}
void backward(const AttentionBackwardParams&, Stream) {
  throw std::runtime_error("stub");
}

}  // namespace pvk::attention
