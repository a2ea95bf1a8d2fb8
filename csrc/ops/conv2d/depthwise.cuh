// What the kernels of depthwise convolution share: the taps of a thread's outputs, and what follows the sums.
//
// Pixels beyond the map count as zeros in a thread's sums; where such a sum is not finite, it is made again without
// them. So padding is never multiplied with a value that is not finite, and the rest of a map pays nothing for it.
#pragma once

#include "core/activation.cuh"
#include "core/group_sum.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "ops/conv2d/cuda_kernels.h"

namespace pvk::conv2d {

// A forward, or the gradient of an input as a forward with flipped taps: through tap r, output i reads the row
// (i * stride - padding + r * dilation) / spread, where that is whole. Columns likewise.
struct DepthwiseParams : Conv2dParams {
  int64_t spread[2];
};

// Any problem, by the kernel that suits it; a spread above 1 by the general one.
void gather_depthwise(const DepthwiseParams& params, Stream stream);

namespace {

// Launches are cut to fill so many.
#if defined(PVK_SIMT)
constexpr int kMultiprocessors = 1;  // so that small maps take every path
#else
constexpr int kMultiprocessors = 132;  // of an H100
#endif

// Along one axis: which of a thread's T outputs reads what of its window through which of K taps.
template <int K, int STEP, int SPREAD, int T>
struct Window {
  static constexpr int kSize = ((T - 1) * STEP + K - 1) / SPREAD + 1;

  PVK_HOST_DEVICE static constexpr bool reads(int output, int tap) { return (output * STEP + tap) % SPREAD == 0; }
  PVK_HOST_DEVICE static constexpr int place(int output, int tap) { return (output * STEP + tap) / SPREAD; }

  // Strips begin where the window does: with a spread of 2 the first one may begin before the map.
  PVK_HOST_DEVICE static int64_t lead(int64_t padding) { return SPREAD == 2 ? padding & 1 : 0; }
  PVK_HOST_DEVICE static int64_t strips(int64_t outputs, int64_t padding) {
    return ceil_div(outputs + lead(padding), int64_t(T));
  }
};

// a / b of numbers that are not negative: a 64-bit division takes a hundred instructions.
PVK_DEVICE int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// A thread of a kernel for planes owns strips of so many columns and rows of outputs; blocks of so many threads, as
// many a multiprocessor as it has registers for.
constexpr int kPlaneThreads = 128;
constexpr int kPlaneColumns = 2;
constexpr int plane_rows(int taps, int step) {
  return taps * step >= 10 ? 2 : 4;
}
constexpr int plane_blocks(int taps) {
  return taps == 3 ? 4 : taps == 5 ? 3 : 2;
}

template <typename T, int N>
PVK_DEVICE bool all_finite(const T (&value)[N]) {
  T zero = T(0);
#pragma unroll
  for (int i = 0; i < N; ++i) zero += value[i] * T(0);
  return zero == T(0);
}

// What follows the sums of VEC neighbours along the channels.
template <typename scalar_t, int VEC>
struct Epilogue {
  using T = opmath_t<scalar_t>;
  T bias[VEC], scale[VEC], shift[VEC];

  PVK_DEVICE void load(const Conv2dParams& p, int64_t k) {
    load_weights<VEC>(p.bias, p.bias_dtype, k, T(0), bias);
    load_weights<VEC>(p.scale, p.scale_dtype, k, T(1), scale);
    load_weights<VEC>(p.shift, p.scale_dtype, k, T(0), shift);
  }

  PVK_DEVICE void apply(const Conv2dParams& p, int64_t n, int64_t k, int64_t oh, int64_t ow, T (&value)[VEC]) const {
#pragma unroll
    for (int e = 0; e < VEC; ++e) value[e] = (value[e] + bias[e]) * scale[e] + shift[e];
    if (p.residual != nullptr) {
      T added[VEC];
      const int64_t at =
          n * p.residual_stride[0] + k * p.residual_stride[1] + oh * p.residual_stride[2] + ow * p.residual_stride[3];
      const scalar_t* const address = static_cast<const scalar_t*>(p.residual) + at;
      if (p.residual_stride[1] == 1 && reinterpret_cast<uintptr_t>(address) % sizeof(VecN<scalar_t, VEC>) == 0) {
        const auto vec = load_vec<VEC>(address);
#pragma unroll
        for (int e = 0; e < VEC; ++e) added[e] = to_opmath(vec.data[e]);
      } else {
        load_strided<T, scalar_t>(address, 0, p.residual_stride[1], added);
      }
#pragma unroll
      for (int e = 0; e < VEC; ++e) value[e] += added[e];
    }
#pragma unroll
    for (int e = 0; e < VEC; ++e) value[e] = activate(p.activation, value[e]);
  }
};

template <typename scalar_t, int VEC>
PVK_DEVICE void store_rounded(scalar_t* address, const opmath_t<scalar_t> (&value)[VEC]) {
  VecN<scalar_t, VEC> result;
#pragma unroll
  for (int e = 0; e < VEC; ++e) result.data[e] = from_opmath<scalar_t>(value[e]);
  store_vec(address, result);
}

// Whether VEC channels from each multiple of VEC on are one aligned vector.
template <typename scalar_t, int VEC>
bool has_channel_vectors(const void* data, const int64_t (&stride)[4], int64_t channels) {
  if (stride[1] != 1 || channels % VEC != 0 || reinterpret_cast<uintptr_t>(data) % (VEC * sizeof(scalar_t)) != 0)
    return false;
  return stride[0] % VEC == 0 && stride[2] % VEC == 0 && stride[3] % VEC == 0;
}

// Vectors of the kernels for channels_last: 16 bytes, or pairs where the channels are not a multiple of those.
constexpr int kPair = 2;
constexpr int kLineBytes = 128;  // that a block's channels take of a pixel, at most

// The K of K x K taps that kernels have as a constant, with a stride of 1 or 2; else 0. Coordinates fit an int.
inline int constant_taps(const Conv2dParams& p) {
  constexpr int64_t kMost = int64_t(1) << 28;
  const bool square = p.R == p.S && p.stride[0] == p.stride[1] && p.stride[0] <= 2;
  const bool small = max_of(max_of(p.H, p.W), max_of(p.OH, p.OW)) < kMost &&
                     max_of(max_of(p.padding_top, -p.padding_top), max_of(p.padding_left, -p.padding_left)) < kMost;
  if (!square || !small || p.dilation[0] != 1 || p.dilation[1] != 1 || p.padding_mode != PaddingMode::kZeros) return 0;
  return p.R == 3 || p.R == 5 || p.R == 7 ? int(p.R) : 0;
}

// f.template operator()<K>() for a K of constant_taps().
template <typename F>
void dispatch_taps(int taps, const F& f) {
  if (taps == 3) return f.template operator()<3>();
  if (taps == 5) return f.template operator()<5>();
  f.template operator()<7>();
}

// As equal parts of `count` as there are, each of at most `most`.
inline int64_t even_part(int64_t count, int64_t most) {
  return count == 0 ? 1 : ceil_div(count, ceil_div(count, most));
}

}  // namespace
}  // namespace pvk::conv2d
