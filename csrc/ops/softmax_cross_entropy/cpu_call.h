// What a call of softmax cross entropy on the CPU knows: constants of the classes, where the operands lie.
#pragma once

#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/moments.h"
#include "core/simd.h"
#include "ops/softmax_cross_entropy/softmax_cross_entropy.h"

namespace pvk::softmax_cross_entropy {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int kVectors = 4;                 // registers of a tile's row
constexpr int64_t kElementsOfPart = 32768;  // that a task handles at least
constexpr int64_t kClassesOfRow = 128;      // from here on neighbours go row by row
constexpr int64_t kClassesOfBlock = 16;     // whose sum is made apart: long chains round

template <typename T>
constexpr int64_t kPositions = kVectors * kLanes<T>;  // of a tile

// Constants of the classes: q_c = scale_c * (1 of the label's class, or the probability) + base_c.
template <typename T>
struct Classes {
  Buffer<T> weight, scale, base;  // [C]
  T base_sum;

  Classes(const SoftmaxCrossEntropyParams& p) : weight(p.C), scale(p.C), base(p.C) {
    for (int64_t c = 0; c < p.C; ++c) weight[c] = T(1);
    if (p.weight != nullptr) {
      dispatch_floating(p.weight_dtype, [&](auto scalar) {
        const auto* source = static_cast<const decltype(scalar)*>(p.weight);
        for (int64_t c = 0; c < p.C; ++c) weight[c] = T(to_float(source[c]));
      });
    }
    double sum = 0;
    for (int64_t c = 0; c < p.C; ++c) {
      scale[c] = T((1 - p.smoothing) * double(weight[c]));
      base[c] = T(p.smoothing / double(p.C) * double(weight[c]));
      sum += double(base[c]);
    }
    base_sum = T(sum);
  }
};

// What a call knows, and its way to the operands.
template <typename scalar_t>
struct Call {
  using T = opmath_t<scalar_t>;

  const SoftmaxCrossEntropyParams& p;
  const Classes<T> classes;
  const bool in_rows;
  const int64_t positions;
  const int64_t width;             // positions that follow each other
  const int64_t class_step, step;  // from class to class, from position to position
  const int64_t tiles;             // or rows
  const int64_t tiles_of_part;
  int64_t wrong = -1;  // the first position with a label that is no class

  explicit Call(const SoftmaxCrossEntropyParams& params)
      : p(params),
        classes(params),
        in_rows(p.classes_last && p.C >= kClassesOfRow),
        positions(p.N * p.S),
        width(p.classes_last ? positions : p.S),
        class_step(p.classes_last ? 1 : p.S),
        step(p.classes_last ? p.C : 1),
        tiles(in_rows      ? positions
              : width == 0 ? 0
                           : positions / width * ceil_div(width, kPositions<T>)),
        tiles_of_part(ceil_div(kElementsOfPart, p.C * (in_rows ? 1 : kPositions<T>))) {}

  const scalar_t* logits(int64_t offset) const { return static_cast<const scalar_t*>(p.input) + offset; }
  const scalar_t* probabilities(int64_t offset) const { return static_cast<const scalar_t*>(p.target) + offset; }
  T* max(int64_t position) const { return static_cast<T*>(p.stats) + position; }
  T* log(int64_t position) const { return static_cast<T*>(p.stats) + positions + position; }

  T* total() const { return static_cast<T*>(p.stats) + 2 * positions; }

  void store_loss(int64_t position, Vec<T> value, int lanes) const {
    if (p.loss_dtype == p.dtype) {
      store_lanes(static_cast<scalar_t*>(p.loss) + position, value, lanes);
    } else {
      store_lanes(static_cast<T*>(p.loss) + position, value, lanes);
    }
  }

  // Of the losses; a reduction has one gradient for all.
  Vec<T> grad(int64_t position, int lanes) const {
    const bool is_single = p.reduction != Reduction::kNone;
    const int64_t at = is_single ? 0 : position;
    const Vec<T> grad = p.loss_dtype == p.dtype
                            ? load_lanes(static_cast<const scalar_t*>(p.grad) + at, is_single ? 1 : lanes)
                            : load_lanes(static_cast<const T*>(p.grad) + at, is_single ? 1 : lanes);
    if (!is_single) return grad;
    return splat(p.reduction == Reduction::kMean ? grad[0] / *total() : T(grad[0]));
  }

  bool is_class(int64_t label) const { return uint64_t(label) < uint64_t(p.C); }

  bool is_ignored(int64_t position) const { return static_cast<const int64_t*>(p.target)[position] == p.ignore_index; }

  // -1: ignored, as is one that is no class.
  PVK_INLINE int64_t label(int64_t position) const {
    const int64_t label = static_cast<const int64_t*>(p.target)[position];
    return is_class(label) && label != p.ignore_index ? label : -1;
  }

  // Notes the first position, from a given one on, with a label that is no class. There is one.
  void note_wrong_label(int64_t position) {
    const int64_t* const labels = static_cast<const int64_t*>(p.target);
    while (labels[position] == p.ignore_index || is_class(labels[position])) ++position;
    int64_t seen = __atomic_load_n(&wrong, __ATOMIC_RELAXED);
    while ((seen < 0 || position < seen) &&
           !__atomic_compare_exchange_n(&wrong, &seen, position, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  }
};

}  // namespace
}  // namespace PVK_ISA
}  // namespace pvk::softmax_cross_entropy
