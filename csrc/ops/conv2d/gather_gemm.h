// Convolution, its gradient with respect to the input, and linear as one matrix product whose left operand is gathered:
// row m is a pixel of the result, the reduction runs over (tap row, tap column, channel), channels fastest.
//
// Along an axis a pixel i of the result has the base i * step + origin in the source, and tap t reads base + t * tap.
// Forward there is one phase. The gradient (`transposed`) has one for each residue of the result modulo the stride: the
// taps that meet it are every period-th from `first` on, and a step along the result is a step along grad_output.
#pragma once

#include <numeric>

#include "ops/conv2d/conv2d.h"

namespace pvk::conv2d {

struct Axis {
  int64_t source;  // pixels
  int64_t result;  // pixels, without those that pooling leaves out
  int64_t taps, stride, dilation, padding;
  int64_t period, tap;  // transposed: taps of a phase are `period` apart, and meet pixels `tap` apart
};

struct AxisPhase {
  int64_t pixels;  // of the result: phase, phase + stride, ...
  int64_t step, origin, tap;
  int64_t taps, first;
};

PVK_HOST_DEVICE AxisPhase phase_of(const Axis& a, bool transposed, int64_t phase) {
  if (!transposed) return {a.result, a.stride, -a.padding, a.dilation, a.taps, 0};
  int64_t first = 0;
  while (first < a.period && first < a.taps && (phase + a.padding - first * a.dilation) % a.stride != 0) ++first;
  const int64_t pixels = ceil_div(a.result - phase, a.stride);
  if (first >= a.period || first >= a.taps) return {pixels, 1, 0, 0, 0, 0};
  const int64_t taps = ceil_div(a.taps - first, a.period);
  return {pixels, 1, (phase + a.padding - first * a.dilation) / a.stride, -a.tap, taps, first};
}

// Strides count elements.
struct GatherGemm {
  const void* source;  // [images, groups * channels, axes[0].source, axes[1].source]
  const void* weight;  // [classes of phases][groups][outputs][pitch] as pack_weight writes it
  const void* bias;    // those of Conv2dParams
  const void* scale;
  const void* shift;
  const void* residual;
  void* output;
  void* partial;  // sums of a split reduction
  DType dtype, bias_dtype, scale_dtype;
  bool tf32, transposed, pool;
  Activation activation;
  PaddingMode padding_mode;
  int64_t images, groups;
  int64_t channels, outputs;  // of a group
  int64_t pitch;              // of the weight: a multiple of 16 bytes
  Axis axes[2];
  int64_t source_stride[4], residual_stride[4], output_stride[4];

  PVK_HOST_DEVICE int64_t phases(int axis) const {
    return transposed ? min_of(axes[axis].stride, axes[axis].result) : 1;
  }
  // Sets of taps that phases have.
  PVK_HOST_DEVICE int64_t classes(int axis) const {
    return transposed ? min_of(axes[axis].period, axes[axis].taps) : 1;
  }
  // At most, of a phase.
  PVK_HOST_DEVICE int64_t depth() const {
    int64_t count = channels;
    for (const Axis& axis : axes) count *= transposed ? ceil_div(axis.taps, axis.period) : axis.taps;
    return count;
  }
};

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The product of a forward convolution, and of a gradient; weight and partial are not set.
GatherGemm gather_gemm_of(const Conv2dParams& params);
GatherGemm gather_gemm_of(const BackwardInputParams& params);

// The weight [K, C / groups, R, S] in the order of the product; weight_bytes() of it. Where the weight already lies so,
// is_packed() says it, and it is read as it is.
bool is_packed(const GatherGemm& gemm, const Conv2dParams& params);
int64_t weight_bytes(const GatherGemm& gemm);
void pack_weight(const GatherGemm& gemm, const Conv2dParams& params, void* target, Stream stream);

// Bytes of `partial`, a multiple of 16, and the product. It is the same rule that splits both.
int64_t partial_bytes(const GatherGemm& gemm);
void run(const GatherGemm& gemm, Stream stream);

// ---- one for each kind of arithmetic, a source file each ----

enum class TileSize { k64x64, k128x32, k128x64, k128x128 };

struct Plan {
  TileSize tile;
  bool vectors;  // the source is read by 16 bytes along its channels
  int64_t tiles_m, tiles_n, splits;
};

Plan plan_of(const GatherGemm& gemm);

void run_float16(const GatherGemm& gemm, const Plan& plan, Stream stream);
void run_bfloat16(const GatherGemm& gemm, const Plan& plan, Stream stream);
void run_tf32(const GatherGemm& gemm, const Plan& plan, Stream stream);
void run_fma(const GatherGemm& gemm, const Plan& plan, Stream stream);

}  // namespace pvk::conv2d
