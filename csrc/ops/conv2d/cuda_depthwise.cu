// Depthwise convolution on CUDA: the choice of a kernel, and the general one.
#include "core/dispatch.cuh"
#include "ops/conv2d/depthwise_constant.cuh"

namespace pvk::conv2d {
namespace {

constexpr int kBlockThreads = 256;

// The row (or column) that tap `tap` of output i reads, or -1.
PVK_DEVICE int64_t source_of(const DepthwiseParams& p, int axis, int64_t i, int64_t tap, int64_t size) {
  const int64_t padding = axis == 0 ? p.padding_top : p.padding_left;
  int64_t at = i * p.stride[axis] - padding + tap * p.dilation[axis];
  if (p.spread[axis] != 1) {
    if (at < 0) return -1;
    const int64_t place = quotient(at, p.spread[axis]);
    if (place * p.spread[axis] != at) return -1;
    at = place;
  }
  return source_index(p.padding_mode, at, size);
}

// The sums of VEC outputs from channel k on; VEC above 1: of as many inputs, side by side in memory.
template <typename scalar_t, int VEC>
PVK_DEVICE void sum_taps(const DepthwiseParams& p, int64_t n, int64_t k, int64_t oh, int64_t ow,
                         opmath_t<scalar_t> (&sum)[VEC]) {
  using T = opmath_t<scalar_t>;
  const int64_t inputs = quotient(p.C, p.groups), first = quotient(k, quotient(p.K, p.groups)) * inputs;
#pragma unroll
  for (int e = 0; e < VEC; ++e) sum[e] = T(0);
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t h = source_of(p, 0, oh, r, p.H);
    for (int64_t s = 0; s < p.S && h >= 0; ++s) {
      const int64_t w = source_of(p, 1, ow, s, p.W);
      if (w < 0) continue;
      const scalar_t* x = static_cast<const scalar_t*>(p.input) + n * p.input_stride[0] + first * p.input_stride[1] +
                          h * p.input_stride[2] + w * p.input_stride[3];
      const int64_t tap = k * p.weight_stride[0] + r * p.weight_stride[2] + s * p.weight_stride[3];
      for (int64_t c = 0; c < inputs; ++c) {
        const VecN<scalar_t, VEC> pixel = load_vec<VEC>(x + c * p.input_stride[1]);
        T taps[VEC];
        load_strided<T, scalar_t>(p.weight, tap + c * p.weight_stride[1], p.weight_stride[0], taps);
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum[e] = fma(to_opmath(pixel.data[e]), taps[e], sum[e]);
      }
    }
  }
}

// A thread owns VEC neighbouring channels of one output, of any depthwise convolution; threads go along the memory of
// the output. VEC above 1: channels_last, as many outputs as inputs. Sums in float32, or float64.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, VEC == 1 ? 2 : 1)
    conv2d_depthwise_kernel(const __grid_constant__ DepthwiseParams p, int64_t count, bool channels_last) {
  using T = opmath_t<scalar_t>;
  const int64_t PH = p.rows_out(), PW = p.columns_out(), groups = p.K / VEC;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    // [N, PH, PW, K] or [N, K, PH, PW]
    const int64_t fastest = channels_last ? groups : PW, middle = channels_last ? PW : PH;
    const int64_t slowest = channels_last ? PH : groups;
    const int64_t rest = quotient(i, fastest), more = quotient(rest, middle), n = quotient(more, slowest);
    const int64_t a = more - n * slowest, b = rest - more * middle, c = i - rest * fastest;
    const int64_t h = channels_last ? a : b, w = channels_last ? b : c, k = (channels_last ? c : a) * VEC;
    Epilogue<scalar_t, VEC> epilogue;
    epilogue.load(p, k);
    T best[VEC];
#pragma unroll 1
    for (int j = 0; j < (p.pool ? 4 : 1); ++j) {
      const int64_t oh = p.pool ? 2 * h + j / 2 : h, ow = p.pool ? 2 * w + j % 2 : w;
      T value[VEC];
      sum_taps<scalar_t, VEC>(p, n, k, oh, ow, value);
      epilogue.apply(p, n, k, oh, ow, value);
#pragma unroll
      for (int e = 0; e < VEC; ++e)  // as max_pool2d: NaN wins
        if (j == 0 || value[e] > best[e] || value[e] != value[e]) best[e] = value[e];
    }
    const int64_t at =
        n * p.output_stride[0] + k * p.output_stride[1] + h * p.output_stride[2] + w * p.output_stride[3];
    store_rounded<scalar_t, VEC>(static_cast<scalar_t*>(p.output) + at, best);
  }
}

template <typename scalar_t, int VEC>
void run_general(const DepthwiseParams& p, Stream stream) {
  const int64_t count = p.N * (p.K / VEC) * p.rows_out() * p.columns_out();
  const int64_t blocks = min_of(ceil_div(count, int64_t(kBlockThreads)), int64_t(1) << 20);
  launch(conv2d_depthwise_kernel<scalar_t, VEC>, {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream}, p, count,
         p.output_stride[1] == 1);
}

}  // namespace

void gather_depthwise(const DepthwiseParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kVec = kVec16<scalar_t>;
    const int taps = p.pool || p.spread[0] != 1 || p.spread[1] != 1 ? 0 : constant_taps(p);
    if (p.stride[0] == 1 ? run_constant<scalar_t, 1, 1>(p, taps, stream)
                         : run_constant<scalar_t, 2, 1>(p, taps, stream))
      return;
    if (suits_channels<scalar_t, kVec>(p)) return run_general<scalar_t, kVec>(p, stream);
    run_general<scalar_t, 1>(p, stream);
  });
}

void forward_depthwise(const Conv2dParams& p, Stream stream) {
  gather_depthwise(DepthwiseParams{p, {1, 1}}, stream);
}

}  // namespace pvk::conv2d
