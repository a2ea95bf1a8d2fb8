// 2-D convolution (cross-correlation, as PyTorch's): parameters, backend interface, and what a tap reads.
//
// N images, C channels in, K channels out, R x S taps; conv = sum over (c, r, s) of input * weight. Then, in this
// order and all optional: + bias, * scale, + shift (a folded batch norm), + residual, activation, 2 x 2 max pooling.
#pragma once

#include "core/activation.h"
#include "core/math.h"
#include "core/types.h"

namespace pvk::conv2d {

// Values are those of pyvision_kernels/ops/conv2d/algorithm.py.
enum class Algorithm : int32_t {
  kDirect,       // any convolution; 1 x 1 is a matrix product
  kWinograd2,    // F(2x2, 3x3): 3 x 3, stride 1, dilation 1, groups 1
  kWinograd4,    // F(4x4, 3x3): the same
  kDepthwise,    // one channel in for each out (or for each few out)
  kFewChannels,  // groups 1 and few channels in: channels and columns of taps are one dimension
  kTf32,         // CUDA: float32 on tensor cores, whose products have 10-bit fractions
};

enum class PaddingMode : int32_t { kZeros, kReflect, kReplicate, kCircular };

// Strides count elements. OH and OW are of the convolution, before pooling.
struct Conv2dParams {
  const void* input;     // [N, C, H, W], any strides
  const void* weight;    // [K, C / groups, R, S], any strides
  const void* packed;    // null, or what pack() wrote for these weights, this algorithm and this dtype
  const void* bias;      // [K] contiguous, or null
  const void* scale;     // [K] contiguous, or null
  const void* shift;     // [K] contiguous, or null
  const void* residual;  // [N, K, OH, OW], any strides, of dtype; or null
  void* output;          // [N, K, OH, OW], pooled [N, K, OH / 2, OW / 2]; dense: contiguous or channels_last
  DType dtype;           // of input, weight, residual and output
  DType bias_dtype;      // dtype, or float32 beside a 16-bit dtype
  DType scale_dtype;     // the same, of scale and shift
  Algorithm algorithm;
  Activation activation;
  PaddingMode padding_mode;
  bool pool;
  int64_t N, C, H, W, K, R, S, OH, OW;
  int64_t groups;
  int64_t stride[2], dilation[2];     // of rows, of columns
  int64_t padding_top, padding_left;  // those below and to the right are in OH and OW
  int64_t input_stride[4], weight_stride[4], residual_stride[4], output_stride[4];
  void* workspace;  // CUDA: of workspace_bytes(), aligned to 16; else null

  PVK_HOST_DEVICE int64_t rows_out() const { return pool ? OH / 2 : OH; }
  PVK_HOST_DEVICE int64_t columns_out() const { return pool ? OW / 2 : OW; }
  // Of the convolution, without an odd last one that pooling leaves out.
  PVK_HOST_DEVICE int64_t whole_rows() const { return pool ? OH / 2 * 2 : OH; }
  PVK_HOST_DEVICE int64_t whole_columns() const { return pool ? OW / 2 * 2 : OW; }
};

// Backend interface. pack() writes packed_bytes() bytes; it reads the fields of the weight and of the geometry alone,
// and where packed_bytes() is 0 the algorithm reads the weight as it is. A backend may ignore `algorithm` and `packed`.
void forward(const Conv2dParams& params, Stream stream);
int64_t packed_bytes(const Conv2dParams& params, Stream stream);
struct PackParams : Conv2dParams {
  void* target;
};
void pack(const PackParams& params, Stream stream);

// ---- CUDA alone ----

// How much workspace the kernels want; all fields but pointers that are written are filled in.
int64_t workspace_bytes(const Conv2dParams& params);

// The gradient of a convolution with zero padding with respect to its input, which is the transposed convolution. The
// fields of Conv2dParams are those of the convolution; its maps, residual, scale, shift, packed and pool are not set.
struct BackwardInputParams : Conv2dParams {  // bias: [C], for transposed convolutions, and so `activation`
  const void* grad_output;                   // [N, K, OH, OW], any strides
  void* grad_input;                          // [N, C, H, W], dense: contiguous or channels_last
  int64_t grad_output_stride[4], grad_input_stride[4];
};
void backward_input(const BackwardInputParams& params, Stream stream);
int64_t workspace_bytes(const BackwardInputParams& params);

// The gradient with respect to the weight. `weight` and its strides are not set.
struct BackwardWeightParams : Conv2dParams {
  const void* grad_output;  // [N, K, OH, OW], any strides
  void* grad_weight;        // [K, C / groups, R, S], dense: contiguous or channels_last
  int64_t grad_output_stride[4], grad_weight_stride[4];
};
void backward_weight(const BackwardWeightParams& params, Stream stream);
int64_t workspace_bytes(const BackwardWeightParams& params);

// The row (or column) of the input that a tap at `i` reads, or -1: zero. Padding is at most `size` (circular), or below
// it (reflect).
PVK_HOST_DEVICE int64_t source_index(PaddingMode mode, int64_t i, int64_t size) {
  if (i >= 0 && i < size) return i;
  switch (mode) {
    case PaddingMode::kReflect:
      return i < 0 ? -i : 2 * (size - 1) - i;
    case PaddingMode::kReplicate:
      return i < 0 ? 0 : size - 1;
    case PaddingMode::kCircular:
      return i < 0 ? i + size : i - size;
    case PaddingMode::kZeros:
      break;
  }
  return -1;
}

}  // namespace pvk::conv2d
