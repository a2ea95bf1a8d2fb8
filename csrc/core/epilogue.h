// What follows a convolution's or a matrix product's sums: y = activation(sum * scale + shift + residual), converted
// and stored, while the sums are hot.
//
// Bias, scale and shift are merged once per call: (sum + bias) * scale + shift = sum * scale + (bias * scale + shift).
// A kernel either hands over rows of sums (finish_rows), or applies finish() to its own registers under
// with_activation(), which chooses the activation outside its loops.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/buffer.h"
#include "core/simd.h"
#include "core/simd_math.h"
#include "core/simd_partial.h"
#include "core/types.h"

namespace pvk::PVK_ISA {

// ---- activations; NaN stays NaN ----

// erf by x + x P(x^2) below 1, and by 1 - exp(-x Q(x)) from there to 4, where it rounds to 1. Errors are below 1.5
// units of rounding.
PVK_INLINE Vec<float> erf_of(Vec<float> x) {
  constexpr float kNear[] = {0.12837917f,   -0.37612626f,  0.11283585f,  -0.026853813f,
                             0.0051883277f, -8.010193e-4f, 7.8538578e-5f};
  constexpr float kFar[] = {1.1286972f,    0.6349583f,     0.1065491f,   -0.0240255f,
                            0.0037646573f, -3.5233147e-4f, 1.4133771e-5f};
  const Vec<float> size = abs_of<float>(x);
  const Vec<float> capped = at_most(size, 4.0f);
  const Vec<float> near = fma(x, polynomial(kNear, x * x), x);
  const Vec<float> far = 1.0f - exp_of<float>(-capped * polynomial(kFar, capped));
  const Vec<float> signed_far = x < 0.0f ? -far : far;
  return size < 1.0f ? near : signed_far;
}

PVK_INLINE Vec<double> erf_of(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_erf(x[lane]);
  return x;
}

template <Activation kActivation, typename T>
PVK_INLINE Vec<T> activate(Vec<T> x) {
  if constexpr (kActivation == Activation::kRelu) {
    return at_least(x, T(0));
  } else if constexpr (kActivation == Activation::kRelu6) {
    return at_most(at_least(x, T(0)), T(6));
  } else if constexpr (kActivation == Activation::kHardswish) {
    return x * at_most(at_least(x + T(3), T(0)), T(6)) * T(1.0 / 6);
  } else if constexpr (kActivation == Activation::kSilu) {
    return x * sigmoid_of<T>(x);
  } else if constexpr (kActivation == Activation::kGelu) {
    return x * T(0.5) * (erf_of(x * T(0.70710678118654752440)) + T(1));
  } else if constexpr (kActivation == Activation::kSigmoid) {
    return sigmoid_of<T>(x);
  } else {
    return x;
  }
}

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

// body(ActivationTag<activation>): `constexpr Activation kActivation = decltype(tag)::value;` in the body.
template <typename Body>
PVK_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kNone:
      return body(ActivationTag<Activation::kNone>{});
    case Activation::kRelu:
      return body(ActivationTag<Activation::kRelu>{});
    case Activation::kRelu6:
      return body(ActivationTag<Activation::kRelu6>{});
    case Activation::kHardswish:
      return body(ActivationTag<Activation::kHardswish>{});
    case Activation::kSilu:
      return body(ActivationTag<Activation::kSilu>{});
    case Activation::kGelu:
      return body(ActivationTag<Activation::kGelu>{});
    case Activation::kSigmoid:
      return body(ActivationTag<Activation::kSigmoid>{});
  }
}

// activation(sum * scale + shift + residual), of registers.
template <Activation kActivation, typename T>
PVK_INLINE Vec<T> finish(Vec<T> sum, Vec<T> scale, Vec<T> shift) {
  return activate<kActivation, T>(fma(sum, scale, shift));
}

template <Activation kActivation, typename T>
PVK_INLINE Vec<T> finish(Vec<T> sum, Vec<T> scale, Vec<T> shift, Vec<T> residual) {
  return activate<kActivation, T>(fma(sum, scale, shift) + residual);
}

// ---- the merged scale and shift of every channel ----

// body(i, element i) of an array of dtype, which is not kFloat64 unless T is double.
template <typename T, typename Body>
PVK_INLINE void for_each_element(const void* data, DType dtype, int64_t count, const Body& body) {
  const auto each = [&](const auto* source) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i) body(i, T(to_float(source[i])));
  };
  switch (dtype) {
    case DType::kFloat32:
      return each(static_cast<const float*>(data));
    case DType::kFloat64:
      return each(static_cast<const double*>(data));
    case DType::kFloat16:
      return each(static_cast<const Float16*>(data));
    case DType::kBFloat16:
      return each(static_cast<const BFloat16*>(data));
  }
}

template <typename T>
class Epilogue {
 public:
  // bias, scale and shift: [channels], or null.
  Epilogue(int64_t channels, const void* bias, DType bias_dtype, const void* scale, const void* shift,
           DType scale_dtype, Activation activation)
      : activation(activation), data_(2 * padded(channels)), pitch_(padded(channels)) {
    T* const factor = data_.data();
    T* const term = factor + pitch_;
    for (int64_t c = 0; c < pitch_; ++c) {
      factor[c] = T(1);
      term[c] = T(0);
    }
    if (scale != nullptr) for_each_element<T>(scale, scale_dtype, channels, [&](int64_t c, T x) { factor[c] = x; });
    if (bias != nullptr)
      for_each_element<T>(bias, bias_dtype, channels, [&](int64_t c, T x) { term[c] = x * factor[c]; });
    if (shift != nullptr) for_each_element<T>(shift, scale_dtype, channels, [&](int64_t c, T x) { term[c] += x; });
  }

  // [channels], and kLanes<T> * 4 more that may be read.
  const T* scale() const { return &data_[0]; }
  const T* shift() const { return &data_[pitch_]; }

  const Activation activation;

 private:
  static int64_t padded(int64_t channels) { return channels + 4 * kLanes<T>; }

  Buffer<T> data_;
  const int64_t pitch_;
};

// Rows of sums to rows of output: rows x channels, beginning at channel `first` of the epilogue.
template <typename scalar_t>
struct FinishRows {
  using T = opmath_t<scalar_t>;
  const T* sums;  // [rows][sums_pitch]; may be read up to the next multiple of kLanes channels
  int64_t sums_pitch;
  scalar_t* output;  // [rows][output_pitch], at channel `first`
  int64_t output_pitch;
  const scalar_t* residual;  // the same, or null
  int64_t residual_pitch, residual_channel_stride;
  int64_t rows, first, channels;
};

template <typename scalar_t>
PVK_INLINE Vec<opmath_t<scalar_t>> load_strided(const scalar_t* source, int64_t stride, int64_t count) {
  Vec<opmath_t<scalar_t>> result{};
  for (int64_t i = 0; i < count; ++i) result[i] = to_float(source[i * stride]);
  return result;
}

template <Activation kActivation, typename scalar_t>
void finish_rows_of(const Epilogue<opmath_t<scalar_t>>& epilogue, const FinishRows<scalar_t>& r) {
  using T = opmath_t<scalar_t>;
  constexpr int kSide = kLanes<T>;
  const T* const scale = epilogue.scale() + r.first;
  const T* const shift = epilogue.shift() + r.first;
  for (int64_t row = 0; row < r.rows; ++row) {
    const T* const sums = r.sums + row * r.sums_pitch;
    scalar_t* const output = r.output + row * r.output_pitch;
    const scalar_t* const residual = r.residual == nullptr ? nullptr : r.residual + row * r.residual_pitch;
    for (int64_t c = 0; c < r.channels; c += kSide) {
      const int64_t left = r.channels - c;
      Vec<T> value = fma(load(sums + c), load(scale + c), load(shift + c));
      if (residual != nullptr) {
        if (r.residual_channel_stride != 1) {
          value += load_strided(residual + c * r.residual_channel_stride, r.residual_channel_stride,
                                left < kSide ? left : kSide);
        } else {
          value += left < kSide ? load_first(residual + c, left) : load(residual + c);
        }
      }
      value = activate<kActivation, T>(value);
      if (left < kSide) {
        store_first(output + c, value, left);
      } else {
        store(output + c, value);
      }
    }
  }
}

template <typename scalar_t>
void finish_rows(const Epilogue<opmath_t<scalar_t>>& epilogue, const FinishRows<scalar_t>& rows) {
  with_activation(epilogue.activation, [&](auto tag) __attribute__((always_inline)) {
    finish_rows_of<decltype(tag)::value>(epilogue, rows);
  });
}

}  // namespace pvk::PVK_ISA
