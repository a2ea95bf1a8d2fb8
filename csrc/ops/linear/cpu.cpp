// linear on the CPU: few rows by dot products with the weight as it is, more by the 1 x 1 convolution, whose pixels are
// the rows.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/conv2d/cpu_kernels.h"
#include "ops/linear/as_convolution.h"
#include "ops/linear/cpu_dot.h"
#include "ops/linear/linear.h"

namespace pvk::linear {
namespace PVK_ISA {
namespace {

// Up to here, packed or not: packing for one call costs more than it gains, and the result is the same with either.
constexpr int64_t kRowsOfDot = 16;

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
