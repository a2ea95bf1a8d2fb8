// Max pooling on CUDA, forward and backward, and its partial inverse. No atomics on floating-point numbers.
#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/max_pool2d/max_pool2d.h"

namespace pvk::max_pool2d {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kStrip = 4;  // outputs of a thread, one below the other

// The largest value so far, and its place.
template <typename T>
struct Maximum {
  T value = -T(INFINITY);
  int32_t place = -1;

  PVK_DEVICE void add(T candidate, int32_t here) {
    if (candidate > value || candidate != candidate) {
      value = candidate;
      place = here;
    }
  }
};

PVK_DEVICE int32_t first_place(const PoolRange& rows, const PoolRange& columns, int64_t width) {
  if (rows.begin >= rows.end || columns.begin >= columns.end) return -1;
  return int32_t(rows.begin * width + columns.begin);
}

// A thread owns kStrip outputs of a plane, one below the other, of K x K windows with stride S: the maximum of each
// row's K pixels is found once, for all the windows that the row is in. Column stride 1. Neighbouring threads have
// neighbouring columns.
template <typename scalar_t, int K, int S, bool kPlaces>
__global__ void __launch_bounds__(kBlockThreads, 4)
    max_pool2d_forward_strips_kernel(const __grid_constant__ MaxPool2dParams p, int64_t strips, int64_t count) {
  using T = opmath_t<scalar_t>;
  const int64_t OH = p.rows.outputs, OW = p.columns.outputs;
  const int H = int(p.rows.size), W = int(p.columns.size);
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t ow = i % OW, oh0 = i / OW % strips * kStrip, plane = i / OW / strips;
    const int64_t n = plane / p.C, c = plane % p.C;
    const scalar_t* const map = static_cast<const scalar_t*>(p.map) + n * p.map_stride[0] + c * p.map_stride[1];
    const int left = int(ow * S - p.columns.padding), top = int(oh0 * S - p.rows.padding);
    Maximum<T> best[kStrip];
#pragma unroll
    for (int o = 0; o < kStrip; ++o) best[o].place = max_of(top + o * S, 0) * W + max_of(left, 0);
#pragma unroll
    for (int r = 0; r < (kStrip - 1) * S + K; ++r) {
      const int y = top + r;
      Maximum<T> along;
      along.place = -2;  // nothing above minus infinity
#pragma unroll
      for (int s = 0; s < K; ++s) {
        const int x = left + s;
        if (y >= 0 && y < H && x >= 0 && x < W)
          along.add(to_opmath(__ldg(map + int64_t(y) * p.map_stride[2] + x)), y * W + x);
      }
#pragma unroll
      for (int o = 0; o < kStrip; ++o)
        if (r >= o * S && r < o * S + K && along.place != -2) best[o].add(along.value, along.place);
    }
#pragma unroll
    for (int o = 0; o < kStrip; ++o) {
      if (oh0 + o >= OH) continue;
      const int64_t at =
          n * p.pooled_stride[0] + c * p.pooled_stride[1] + (oh0 + o) * p.pooled_stride[2] + ow * p.pooled_stride[3];
      static_cast<scalar_t*>(p.pooled)[at] = from_opmath<scalar_t>(best[o].value);
      if constexpr (kPlaces) p.places[at] = best[o].place;
    }
  }
}

// A thread owns VEC channels of one output, of any window; threads go along the memory of the output. VEC above 1:
// channels_last.
template <typename scalar_t, int VEC, bool kPlaces>
__global__ void __launch_bounds__(kBlockThreads, 4)
    max_pool2d_forward_kernel(const __grid_constant__ MaxPool2dParams p, int64_t count) {
  using T = opmath_t<scalar_t>;
  const int64_t OH = p.rows.outputs, OW = p.columns.outputs, groups = p.C / VEC;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t pixel = p.channels_last ? i / groups : i, rest = p.channels_last ? pixel / OW / OH : i / OW / OH;
    const int64_t c = (p.channels_last ? i % groups : rest % p.C) * VEC, n = p.channels_last ? rest : rest / p.C;
    const int64_t oh = pixel / OW % OH, ow = pixel % OW;
    const PoolRange rows = p.rows.window(oh), columns = p.columns.window(ow);
    const scalar_t* const map = static_cast<const scalar_t*>(p.map) + n * p.map_stride[0] + c * p.map_stride[1];
    Maximum<T> best[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) best[e].place = first_place(rows, columns, p.columns.size);
    for (int64_t y = rows.begin; y < rows.end; y += p.rows.dilation) {
      for (int64_t x = columns.begin; x < columns.end; x += p.columns.dilation) {
        const VecN<scalar_t, VEC> value = load_vec<VEC>(map + y * p.map_stride[2] + x * p.map_stride[3]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) best[e].add(to_opmath(value.data[e]), int32_t(y * p.columns.size + x));
      }
    }
    const int64_t at =
        n * p.pooled_stride[0] + c * p.pooled_stride[1] + oh * p.pooled_stride[2] + ow * p.pooled_stride[3];
    VecN<scalar_t, VEC> result;
#pragma unroll
    for (int e = 0; e < VEC; ++e) result.data[e] = from_opmath<scalar_t>(best[e].value);
    store_vec(static_cast<scalar_t*>(p.pooled) + at, result);
    if constexpr (kPlaces && VEC % 4 == 0) {
#pragma unroll
      for (int e = 0; e + 4 <= VEC; e += 4) {
        const VecN<int32_t, 4> places{best[e].place, best[e + 1].place, best[e + 2].place, best[e + 3].place};
        store_vec(p.places + at + e, places);
      }
    } else if constexpr (kPlaces) {
#pragma unroll
      for (int e = 0; e < VEC; ++e) p.places[at + e] = best[e].place;
    }
  }
}

// A thread owns VEC channels of one pixel of the gradient: it adds, in their order, the gradients of the windows that
// the pixel is in and has won. Threads go along the memory of the gradient. VEC above 1: channels_last.
template <typename scalar_t, int VEC>
__global__ void __launch_bounds__(kBlockThreads, 3)
    max_pool2d_backward_kernel(const __grid_constant__ MaxPool2dParams p, int64_t count) {
  using T = opmath_t<scalar_t>;
  const int64_t H = p.rows.size, W = p.columns.size, groups = p.C / VEC;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t pixel = p.channels_last ? i / groups : i, rest = p.channels_last ? pixel / W / H : i / W / H;
    const int64_t c = (p.channels_last ? i % groups : rest % p.C) * VEC, n = p.channels_last ? rest : rest / p.C;
    const int64_t y = pixel / W % H, x = pixel % W;
    const PoolRange rows = p.rows.outputs_of(y), columns = p.columns.outputs_of(x);
    const int32_t here = int32_t(y * W + x);
    T sum[VEC];
#pragma unroll
    for (int e = 0; e < VEC; ++e) sum[e] = T(0);
    for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
      for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
        const int64_t at =
            n * p.pooled_stride[0] + c * p.pooled_stride[1] + oh * p.pooled_stride[2] + ow * p.pooled_stride[3];
        const VecN<scalar_t, VEC> grad = load_vec<VEC>(static_cast<const scalar_t*>(p.pooled) + at);
        constexpr int kPart = VEC % 4 == 0 ? 4 : 1;
#pragma unroll
        for (int e = 0; e < VEC; e += kPart) {
          const VecN<int32_t, kPart> place = load_vec<kPart>(p.places + at + e);
#pragma unroll
          for (int j = 0; j < kPart; ++j)
            if (place.data[j] == here) sum[e + j] += to_opmath(grad.data[e + j]);
        }
      }
    }
    VecN<scalar_t, VEC> result;
#pragma unroll
    for (int e = 0; e < VEC; ++e) result.data[e] = from_opmath<scalar_t>(sum[e]);
    const int64_t target = n * p.map_stride[0] + c * p.map_stride[1] + y * p.map_stride[2] + x * p.map_stride[3];
    store_vec(static_cast<scalar_t*>(p.map) + target, result);
  }
}

// ---- the partial inverse: the last element of each place by integer atomics, and then the values ----

__global__ void __launch_bounds__(kBlockThreads, 4) max_unpool2d_clear_kernel(int32_t* owner, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads)
    owner[i] = -1;
}

// A thread owns one element of the input; `plane` elements of a plane, or of an image of channels_last, G side by side.
__global__ void __launch_bounds__(kBlockThreads, 4)
    max_unpool2d_claim_kernel(const __grid_constant__ MaxUnpool2dParams p, int64_t G, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t place = __ldg(p.places + i), plane = i / (p.pixels_in * G), pixel = i / G % p.pixels_in;
    if (place >= 0 && place < p.pixels_out)
      atomicMax(p.owner + (plane * p.pixels_out + place) * G + i % G, int32_t(pixel));
  }
}

// A thread owns one element of the output.
template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 4)
    max_unpool2d_write_kernel(const __grid_constant__ MaxUnpool2dParams p, int64_t G, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBlockThreads) {
    const int64_t plane = i / (p.pixels_out * G);
    const int32_t pixel = p.owner[i];
    scalar_t value = from_opmath<scalar_t>(0);
    if (pixel >= 0) value = __ldg(static_cast<const scalar_t*>(p.input) + (plane * p.pixels_in + pixel) * G + i % G);
    static_cast<scalar_t*>(p.output)[i] = value;
  }
}

LaunchConfig config_of(int64_t count, Stream stream) {
  const int64_t blocks = min_of(ceil_div(count, int64_t(kBlockThreads)), int64_t(1) << 22);
  return {dim3(unsigned(blocks)), dim3(kBlockThreads), 0, stream};
}

// Whether channels can be read and written as 16-byte vectors.
template <typename scalar_t>
bool allows_vectors(const MaxPool2dParams& p) {
  constexpr int64_t kVec = kVec16<scalar_t>;
  if (!p.channels_last || p.C % kVec != 0) return false;
  for (int i = 0; i < 4; ++i)
    if (i != 1 && (p.map_stride[i] % kVec != 0 || p.pooled_stride[i] % kVec != 0)) return false;
  for (const void* data :
       {static_cast<const void*>(p.map), static_cast<const void*>(p.pooled), static_cast<const void*>(p.places)})
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  return true;
}

template <typename scalar_t, int K, int S, bool kPlaces>
void forward_strips(const MaxPool2dParams& p, Stream stream) {
  const int64_t strips = ceil_div(p.rows.outputs, int64_t(kStrip));
  const int64_t count = p.N * p.C * strips * p.columns.outputs;
  launch(max_pool2d_forward_strips_kernel<scalar_t, K, S, kPlaces>, config_of(count, stream), p, strips, count);
}

template <typename scalar_t, int VEC, bool kPlaces>
void forward_any(const MaxPool2dParams& p, Stream stream) {
  const int64_t count = p.N * (p.C / VEC) * p.rows.outputs * p.columns.outputs;
  launch(max_pool2d_forward_kernel<scalar_t, VEC, kPlaces>, config_of(count, stream), p, count);
}

// The K of K x K windows with stride S and dilation 1; 0: others.
int square_window(const MaxPool2dParams& p, int64_t& stride) {
  const PoolAxis &a = p.rows, &b = p.columns;
  stride = a.stride;
  const bool plain = a.kernel == b.kernel && a.stride == b.stride && a.dilation == 1 && b.dilation == 1 &&
                     a.padding < a.kernel && b.padding < b.kernel && a.size < 1 << 30 && b.size < 1 << 30 &&
                     a.outputs < 1 << 30 && b.outputs < 1 << 30;
  return plain ? int(min_of(a.kernel, int64_t(1000))) : 0;
}

template <typename scalar_t, bool kPlaces>
void forward_typed(const MaxPool2dParams& p, Stream stream) {
  constexpr int kVec = kVec16<scalar_t>;
  if (allows_vectors<scalar_t>(p)) return forward_any<scalar_t, kVec, kPlaces>(p, stream);
  int64_t stride = 0;
  const int kernel = p.channels_last ? 0 : square_window(p, stride);
  if (kernel == 2 && stride == 2) return forward_strips<scalar_t, 2, 2, kPlaces>(p, stream);
  if (kernel == 3 && stride == 1) return forward_strips<scalar_t, 3, 1, kPlaces>(p, stream);
  if (kernel == 3 && stride == 2) return forward_strips<scalar_t, 3, 2, kPlaces>(p, stream);
  forward_any<scalar_t, 1, kPlaces>(p, stream);
}

}  // namespace

void forward(const MaxPool2dParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    if (p.places == nullptr) return forward_typed<scalar_t, false>(p, stream);
    forward_typed<scalar_t, true>(p, stream);
  });
}

void backward(const MaxPool2dParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    constexpr int kVec = kVec16<scalar_t>;
    const int64_t count = p.N * p.C * p.rows.size * p.columns.size;
    if (allows_vectors<scalar_t>(p)) {
      launch(max_pool2d_backward_kernel<scalar_t, kVec>, config_of(count / kVec, stream), p, count / kVec);
    } else {
      launch(max_pool2d_backward_kernel<scalar_t, 1>, config_of(count, stream), p, count);
    }
  });
}

int64_t unpool(const MaxUnpool2dParams& p, Stream stream) {
  const int64_t G = p.channels_last ? p.C : 1, count_in = p.N * p.C * p.pixels_in, count = owner_elements(p, stream);
  if (count == 0) return -1;
  launch(max_unpool2d_clear_kernel, config_of(count, stream), p.owner, count);
  if (count_in > 0) launch(max_unpool2d_claim_kernel, config_of(count_in, stream), p, G, count_in);
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    launch(max_unpool2d_write_kernel<scalar_t>, config_of(count, stream), p, G, count);
  });
  return -1;
}

int64_t owner_elements(const MaxUnpool2dParams& p, Stream) {
  return p.N * p.C * p.pixels_out;
}

}  // namespace pvk::max_pool2d
