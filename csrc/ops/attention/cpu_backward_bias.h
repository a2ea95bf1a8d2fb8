// The gradient of the bias: what rows of scores add to it, in copies that are summed in order.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/buffer.h"
#include "core/parallel.h"
#include "ops/attention/cpu_backward_plan.h"
#include "ops/attention/cpu_scores.h"

namespace pvk::attention::PVK_ISA {

inline void zero_in_parallel(void* data, int64_t bytes) {
  char* const target = static_cast<char*>(data);
  parallel_for(bytes, 1 << 18,
               [&](int64_t begin, int64_t end) { std::memset(target + begin, 0, uint64_t(end - begin)); });
}

template <typename scalar_t>
class BiasGradient {
 public:
  using T = opmath_t<scalar_t>;

  BiasGradient(const AttentionBackwardParams& params, const BackwardPlan& plan) : params_(params), plan_(plan) {
    if (!plan.has_bias) return;
    const AttentionParams& p = params.forward;
    const int64_t (&size)[4] = params.bias_size;
    elements_ = size[0] * size[1] * size[2] * size[3];
    is_computing_ = sizeof(scalar_t) == sizeof(T) || p.bias_kind == BiasKind::kAddedFloat;
    const bool once = elements_ == p.B * p.H * p.L * p.S;
    if (!is_computing_ && once) {
      written_ = static_cast<scalar_t*>(params.grad_bias);
      if (has_limits(p)) zero_in_parallel(written_, elements_ * int64_t(sizeof(scalar_t)));
      return;
    }
    in_place_ = is_computing_ && plan.copies() == 1;
    if (!in_place_) copies_.reserve(plan.copies() * elements_);
    sums_ = in_place_ ? static_cast<T*>(params.grad_bias) : copies_.data();
    zero_in_parallel(sums_, plan.copies() * elements_ * int64_t(sizeof(T)));
  }

  bool is_given() const { return plan_.has_bias; }

  // Adds row[0, count), the gradients of the scores of the query i with the keys from j on.
  PVK_INLINE void add(const T* row, int64_t copy, int64_t b, int64_t h, int64_t i, int64_t j, int64_t count) const {
    const int64_t (&size)[4] = params_.bias_size;
    const auto place = [](int64_t index, int64_t size) { return size == 1 ? 0 : index; };
    const int64_t offset =
        ((place(b, size[0]) * size[1] + place(h, size[1])) * size[2] + place(i, size[2])) * size[3] + place(j, size[3]);
    if (written_ != nullptr) {
      for (int64_t c = 0; c < count; c += kLanes<T>)
        store_at_most<scalar_t, T>(written_ + offset + c, load(row + c), count - c);
      return;
    }
    T* const target = sums_ + copy * elements_ + offset;
    if (plan_.shares_keys) {
      Vec<T> sum{};
      for (int64_t c = 0; c < count; c += kLanes<T>) sum += load_at_most<T, T>(row + c, count - c);
      *target += sum_of_lanes<T>(sum);
      return;
    }
    for (int64_t c = 0; c < count; c += kLanes<T>)
      store_at_most<T, T>(target + c, load_at_most<T, T>(target + c, count - c) + load(row + c), count - c);
  }

  void finish() const {
    if (!plan_.has_bias || written_ != nullptr || in_place_) return;
    parallel_for(elements_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; e += kLanes<T>) {
        Vec<T> sum = load_at_most<T, T>(sums_ + e, end - e);
        for (int64_t copy = 1; copy < plan_.copies(); ++copy)
          sum += load_at_most<T, T>(sums_ + copy * elements_ + e, end - e);
        if (is_computing_) {
          store_at_most<T, T>(static_cast<T*>(params_.grad_bias) + e, sum, end - e);
        } else {
          store_at_most<scalar_t, T>(static_cast<scalar_t*>(params_.grad_bias) + e, sum, end - e);
        }
      }
    });
  }

 private:
  const AttentionBackwardParams& params_;
  const BackwardPlan& plan_;
  int64_t elements_ = 0;
  bool is_computing_ = false, in_place_ = false;  // of the computing type; summed where it is wanted
  scalar_t* written_ = nullptr;                   // where each element has one summand
  T* sums_ = nullptr;                             // [copies][bias_size]
  Buffer<T> copies_;
};

}  // namespace pvk::attention::PVK_ISA
