// linear on the CPU: plain loops, to be replaced.
#include <cmath>

#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/linear/linear.h"

namespace pvk::linear {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

template <typename T>
T activate(Activation activation, T x) {
  switch (activation) {
    case Activation::kRelu:
      return x < 0 ? T(0) : x;
    case Activation::kRelu6:
      return x < 0 ? T(0) : x > 6 ? T(6) : x;
    case Activation::kHardswish:
      return x * (x < -3 ? T(0) : x > 3 ? T(1) : (x + 3) / 6);
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return T(0.5) * x * (1 + std::erf(x * T(0.70710678118654752440)));
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::kNone:
      break;
  }
  return x;
}

}  // namespace

void forward(const LinearParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    using T = opmath_t<scalar_t>;
    parallel_for(p.M * p.K, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m = i / p.K, k = i % p.K;
        T sum = 0;
        for (int64_t c = 0; c < p.C; ++c)
          sum += T(to_float(static_cast<const scalar_t*>(p.input)[m * p.input_stride[0] + c * p.input_stride[1]])) *
                 T(to_float(static_cast<const scalar_t*>(p.weight)[k * p.weight_stride[0] + c * p.weight_stride[1]]));
        if (p.bias)
          sum += p.bias_dtype == p.dtype ? T(to_float(static_cast<const scalar_t*>(p.bias)[k]))
                                         : T(static_cast<const float*>(p.bias)[k]);
        if (p.residual)
          sum += T(
              to_float(static_cast<const scalar_t*>(p.residual)[m * p.residual_stride[0] + k * p.residual_stride[1]]));
        static_cast<scalar_t*>(p.output)[i] = from_float<scalar_t>(activate(p.activation, sum));
      }
    });
  });
}

int64_t packed_bytes(const LinearParams&) {
  return 0;
}

void pack(const PackParams&) {}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, LinearParams)
PVK_CPU_ENTRY(int64_t, packed_bytes, LinearParams)
PVK_CPU_ENTRY(void, pack, PackParams)

}  // namespace pvk::linear
