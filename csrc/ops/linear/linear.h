// Fully connected layer: parameters and backend interface.
//
// M rows of C features in, K features out: output[m, k] = activation(sum over c of input[m, c] * weight[k, c] + bias[k]
// + residual[m, k]).
#pragma once

#include "core/activation.h"
#include "core/types.h"

namespace pvk::linear {

// Strides count elements.
struct LinearParams {
  const void* input;     // [M, C], any strides
  const void* weight;    // [K, C], any strides
  const void* packed;    // null, or what pack() wrote for this weight and this dtype
  const void* bias;      // [K] contiguous, or null
  const void* residual;  // [M, K], any strides, of dtype; or null
  void* output;          // [M, K], contiguous
  DType dtype;           // of input, weight, residual and output
  DType bias_dtype;      // dtype, or float32 beside a 16-bit dtype
  Activation activation;
  bool tf32;  // CUDA: float32 on tensor cores, whose products have 10-bit fractions
  int64_t M, C, K;
  int64_t input_stride[2], weight_stride[2], residual_stride[2];
  void* workspace;  // CUDA: of workspace_bytes(), aligned to 16; else null
};

// Backend interface. pack() writes packed_bytes() bytes; it reads the fields of the weight alone (M does not matter).
// Where M is small the kernel reads `weight` itself, so both are given. Where packed_bytes() is 0, or packed is null,
// the kernel packs into its own scratch at every call that needs it.
void forward(const LinearParams& params, Stream stream);
int64_t packed_bytes(const LinearParams& params, Stream stream);
struct PackParams : LinearParams {
  void* target;
};
void pack(const PackParams& params, Stream stream);

// CUDA alone: how much workspace the kernels want; all fields but `output` are filled in.
int64_t workspace_bytes(const LinearParams& params);

}  // namespace pvk::linear
