// A few rows times an unpacked weight: dot products along C, each weight read once for up to four rows.
//
// A piece of work is a run of outputs for all rows; its weights come from memory once, and from the cache for further
// groups of rows. The order of each sum depends on C alone.
#pragma once

#include "core/buffer.h"
#include "core/epilogue.h"
#include "core/gemm_bfloat16.h"
#include "core/isa.h"
#include "core/math.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/simd_partial.h"
#include "ops/linear/linear.h"

namespace pvk::linear::PVK_ISA {

using namespace pvk::PVK_ISA;

template <typename T>
struct IsFloat16 {
  static constexpr bool value = false;
};
template <>
struct IsFloat16<Float16> {
  static constexpr bool value = true;
};

template <typename T>
PVK_INLINE T sum_of(Vec<T> x) {
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 4
  for (int half = lanes / 2; half > 0; half /= 2) {
    Mask<T> order{};
    for (int i = 0; i < lanes; ++i) order[i] = (i + half) % lanes;
    x += __builtin_shuffle(x, order);
  }
  return x[0];
}

// sums[i * pitch + j] = rows[i] . weights[j], of `channels` elements.
template <int kRows, int kOutputs, typename scalar_t>
PVK_INLINE void dot_tile(opmath_t<scalar_t>* sums, int64_t pitch, const scalar_t* const* rows,
                         const scalar_t* const* weights, int64_t outputs, int64_t channels) {
  using T = opmath_t<scalar_t>;
  const scalar_t* weight[kOutputs];
  for (int j = 0; j < kOutputs; ++j) weight[j] = weights[j < outputs ? j : outputs - 1];
  Vec<T> sum[kRows][kOutputs] = {};
  const auto step = [&](auto fetch) __attribute__((always_inline)) {
    Vec<T> value[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) value[i] = fetch(rows[i]);
#pragma GCC unroll 8
    for (int j = 0; j < kOutputs; ++j) {
      const Vec<T> factor = fetch(weight[j]);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][j] = fma(value[i], factor, sum[i][j]);
    }
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= channels; c += kLanes<T>)
    step([&](const scalar_t* from) __attribute__((always_inline)) { return load(from + c); });
  if (c < channels)
    step([&](const scalar_t* from) __attribute__((always_inline)) { return load_first(from + c, channels - c); });
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kOutputs; ++j)
      if (j < outputs) sums[i * pitch + j] = sum_of<T>(sum[i][j]);
}

#if defined(__AVX512F__)
// The same by the dot products of AVX512-BF16.
template <int kRows, int kOutputs>
PVK_BFLOAT16_DOT void dot_tile_bfloat16(float* sums, int64_t pitch, const BFloat16* const* rows,
                                        const BFloat16* const* weights, int64_t outputs, int64_t channels) {
  const BFloat16* weight[kOutputs];
  for (int j = 0; j < kOutputs; ++j) weight[j] = weights[j < outputs ? j : outputs - 1];
  Vec<float> sum[kRows][kOutputs] = {};
  for (int64_t c = 0; c < channels; c += 32) {
    const __mmask32 mask = channels - c >= 32 ? ~__mmask32(0) : (__mmask32(1) << (channels - c)) - 1;
    __m512bh value[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) value[i] = (__m512bh)_mm512_maskz_loadu_epi16(mask, rows[i] + c);
#pragma GCC unroll 8
    for (int j = 0; j < kOutputs; ++j) {
      const __m512bh factor = (__m512bh)_mm512_maskz_loadu_epi16(mask, weight[j] + c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], value[i], factor);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kOutputs; ++j)
      if (j < outputs) sums[i * pitch + j] = sum_of<float>(sum[i][j]);
}
#endif

template <int kRows, int kOutputs, typename scalar_t>
void dot(opmath_t<scalar_t>* sums, int64_t pitch, const scalar_t* const* rows, const scalar_t* const* weights,
         int64_t outputs, int64_t channels) {
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 2 && !IsFloat16<scalar_t>::value) {
    if (cpu_has_bfloat16_dot())
      return dot_tile_bfloat16<kRows, kOutputs>(sums, pitch, rows, weights, outputs, channels);
  }
#endif
  dot_tile<kRows, kOutputs>(sums, pitch, rows, weights, outputs, channels);
}

// Rows of input and weight have stride 1 along C.
template <typename scalar_t>
void forward_dot(const LinearParams& p) {
  using T = opmath_t<scalar_t>;
  constexpr int kMany = kRegisterBytes == 64 ? 8 : 4, kFew = kRegisterBytes == 64 ? 4 : 2;
  const scalar_t* const input = static_cast<const scalar_t*>(p.input);
  const scalar_t* const weight = static_cast<const scalar_t*>(p.weight);
  const Epilogue<T> epilogue(p.K, p.bias, p.bias_dtype, nullptr, nullptr, p.dtype, p.activation);
  const int64_t run = max_of<int64_t>(8, min_of<int64_t>(64, p.K / (8 * thread_count()) / 8 * 8));
  parallel_for(ceil_div(p.K, run), 1, [&](int64_t begin, int64_t end) {
    Buffer<T> sums(p.M * run + kLanes<T>);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * run, last = min_of(p.K, first + run);
      for (int64_t k = first; k < last;) {
        const bool few = p.M > 2;
        const int64_t outputs = min_of<int64_t>(last - k, few ? kFew : kMany);
        const scalar_t* weights[kMany];
        for (int64_t j = 0; j < outputs; ++j) weights[j] = weight + (k + j) * p.weight_stride[0];
        for (int64_t m = 0; m < p.M;) {
          const int64_t rows_left = p.M - m;
          const scalar_t* rows[4];
          for (int64_t i = 0; i < 4; ++i) rows[i] = input + (m + min_of(i, rows_left - 1)) * p.input_stride[0];
          T* const to = &sums[m * run + k - first];
          if (!few) {
            if (rows_left >= 2) {
              dot<2, kMany>(to, run, rows, weights, outputs, p.C);
            } else {
              dot<1, kMany>(to, run, rows, weights, outputs, p.C);
            }
            m += 2;
          } else {
            if (rows_left >= 4) {
              dot<4, kFew>(to, run, rows, weights, outputs, p.C);
            } else if (rows_left == 3) {
              dot<3, kFew>(to, run, rows, weights, outputs, p.C);
            } else if (rows_left == 2) {
              dot<2, kFew>(to, run, rows, weights, outputs, p.C);
            } else {
              dot<1, kFew>(to, run, rows, weights, outputs, p.C);
            }
            m += 4;
          }
        }
        k += outputs;
      }
      FinishRows<scalar_t> rows{};
      rows.sums = sums.data();
      rows.sums_pitch = run;
      rows.output = static_cast<scalar_t*>(p.output) + first;
      rows.output_pitch = p.K;
      if (p.residual != nullptr)
        rows.residual = static_cast<const scalar_t*>(p.residual) + first * p.residual_stride[1];
      rows.residual_pitch = p.residual_stride[0];
      rows.residual_channel_stride = p.residual_stride[1];
      rows.rows = p.M;
      rows.first = first;
      rows.channels = last - first;
      finish_rows(epilogue, rows);
    }
  });
}

}  // namespace pvk::linear::PVK_ISA
