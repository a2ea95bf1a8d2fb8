// linear on the CPU: few rows by dot products with the weight as it is, more by the 1 x 1 convolution, whose pixels are
// the rows.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/conv2d/cpu_kernels.h"
#include "ops/linear/cpu_dot.h"
#include "ops/linear/linear.h"

namespace pvk::linear {
namespace PVK_ISA {
namespace {

// Up to here, packed or not: packing for one call costs more than it gains, and the result is the same with either.
constexpr int64_t kRowsOfDot = 16;

template <typename Params>
Params as_convolution(const LinearParams& p) {
  Params conv{};
  conv.input = p.input;
  conv.weight = p.weight;
  conv.packed = p.packed;
  conv.bias = p.bias;
  conv.residual = p.residual;
  conv.output = p.output;
  conv.dtype = conv.scale_dtype = p.dtype;
  conv.bias_dtype = p.bias_dtype;
  conv.activation = p.activation;
  conv.N = conv.H = conv.OH = conv.R = conv.S = conv.groups = 1;
  conv.C = p.C;
  conv.W = conv.OW = p.M;
  conv.K = p.K;
  for (int i = 0; i < 2; ++i) conv.stride[i] = conv.dilation[i] = 1;
  const auto set = [](int64_t (&stride)[4], int64_t row, int64_t channel, int64_t rows) {
    stride[0] = stride[2] = rows * row;
    stride[1] = channel;
    stride[3] = row;
  };
  set(conv.input_stride, p.input_stride[0], p.input_stride[1], p.M);
  set(conv.residual_stride, p.residual_stride[0], p.residual_stride[1], p.M);
  set(conv.output_stride, p.K, 1, p.M);
  conv.weight_stride[0] = p.weight_stride[0];
  conv.weight_stride[1] = p.weight_stride[1];
  return conv;
}

// The rows, dense.
template <typename scalar_t>
void copy_rows(const LinearParams& p, scalar_t* target) {
  const scalar_t* const input = static_cast<const scalar_t*>(p.input);
  parallel_for(p.M, 8, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t c = 0; c < p.C; ++c) target[m * p.C + c] = input[m * p.input_stride[0] + c * p.input_stride[1]];
  });
}

template <typename scalar_t>
void forward_typed(const LinearParams& params) {
  LinearParams p = params;
  Buffer<scalar_t> dense;
  if (p.input_stride[1] != 1 && p.C > 1) {
    dense.reserve(p.M * p.C);
    copy_rows(params, dense.data());
    p.input = dense.data();
    p.input_stride[0] = p.C;
    p.input_stride[1] = 1;
  }
  if (p.M <= kRowsOfDot && (p.weight_stride[1] == 1 || p.C <= 1)) return forward_dot<scalar_t>(p);
  conv2d::PVK_ISA::forward_direct(as_convolution<conv2d::Conv2dParams>(p));
}

}  // namespace

void forward(const LinearParams& p) {
  if (p.M * p.K == 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) { forward_typed<decltype(scalar)>(p); });
}

int64_t packed_bytes(const LinearParams& p) {
  return conv2d::PVK_ISA::packed_bytes_direct(as_convolution<conv2d::Conv2dParams>(p));
}

void pack(const PackParams& p) {
  auto conv = as_convolution<conv2d::PackParams>(p);
  conv.target = p.target;
  conv2d::PVK_ISA::pack_direct(conv);
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, LinearParams)
PVK_CPU_ENTRY(int64_t, packed_bytes, LinearParams)
PVK_CPU_ENTRY(void, pack, PackParams)

}  // namespace pvk::linear
