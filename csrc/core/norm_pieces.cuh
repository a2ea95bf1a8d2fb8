// What normalisations of maps share on CUDA: gradients before an activation, gradients of vectors, the grid of a pass.
#pragma once

#include "core/activation.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"

namespace pvk {

// The gradient before the activation, from the one behind it and the activation's result; NaN passes.
template <typename T>
PVK_DEVICE T before_activation(Activation activation, T grad, T result) {
  if (activation == Activation::kNone) return grad;
  if (result <= T(0)) return T(0);
  return activation == Activation::kRelu6 && result >= T(6) ? T(0) : grad;
}

// The same at element i of the maps of a backward.
template <typename scalar_t, typename Params>
PVK_DEVICE opmath_t<scalar_t> gradient_at(const Params& p, int64_t i) {
  using T = opmath_t<scalar_t>;
  const T grad = to_opmath(__ldg(static_cast<const scalar_t*>(p.grad) + i));
  if (p.activation == Activation::kNone) return grad;
  return before_activation(p.activation, grad, T(to_opmath(__ldg(static_cast<const scalar_t*>(p.output) + i))));
}

// The same of neighbours from element i on, rounded.
template <int VEC, typename scalar_t, typename Params>
PVK_DEVICE VecN<scalar_t, VEC> gradients_at(const Params& p, int64_t i) {
  auto grad = load_vec<VEC>(static_cast<const scalar_t*>(p.grad) + i);
  if (p.activation == Activation::kNone) return grad;
  const auto result = load_vec<VEC>(static_cast<const scalar_t*>(p.output) + i);
#pragma unroll
  for (int e = 0; e < VEC; ++e)
    grad.data[e] = from_opmath<scalar_t>(
        before_activation<opmath_t<scalar_t>>(p.activation, to_opmath(grad.data[e]), to_opmath(result.data[e])));
  return grad;
}

// Element c of a vector whose dtype only the run knows; nothing where there is none.
template <typename T>
PVK_DEVICE void store_element(void* target, DType dtype, int64_t c, T value) {
  if (target == nullptr) return;
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(target)[c] = float(value);
      return;
    case DType::kFloat64:
      static_cast<double*>(target)[c] = double(value);
      return;
    case DType::kFloat16:
      static_cast<__half*>(target)[c] = from_opmath<__half>(float(value));
      return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(target)[c] = from_opmath<__nv_bfloat16>(float(value));
      return;
  }
}

// Blocks of `threads` that go over `count` elements, `vec` a thread at a time.
inline LaunchConfig over_elements(int64_t count, int vec, int threads, Stream stream) {
  constexpr int64_t kMostBlocks = 65535;
  const int64_t blocks = ceil_div(count, int64_t(threads) * vec);
  return {dim3(unsigned(min_of(blocks, kMostBlocks))), dim3(unsigned(threads)), 0, stream};
}

}  // namespace pvk
