// Softmax cross entropy on the CPU: one pass over the logits forward, one backward.
//
// Positions whose logits lie apart ([N, C, S], or few classes) go through a tile [C][kPositions] that stays in the
// cache, a lane a position; many classes that are neighbours go row by row, a lane a class. Sums over positions are
// made in parts whose borders depend on the sizes alone, and then added in order: the same bits for any number of
// threads.
#include "core/isa.h"
#include "core/largest.h"
#include "core/parallel.h"
#include "core/simd_math.h"
#include "core/transpose.h"
#include "ops/softmax_cross_entropy/cpu_call.h"

namespace pvk::softmax_cross_entropy {
namespace PVK_ISA {
namespace {

template <typename T>
PVK_INLINE Vec<T> only(Vec<T> value, int lanes) {
  return lanes == kLanes<T> ? value : first_lanes<T>(lanes) ? value : Vec<T>{};
}

// ---- tiles: [C][kPositions], a lane a position ----

struct Place {
  int64_t position, offset;  // the first of P; its first logit
  int lanes;
};

template <typename scalar_t>
Place place_of(const Call<scalar_t>& call, int64_t tile) {
  constexpr int64_t kSide = kPositions<opmath_t<scalar_t>>;
  const int64_t of_map = ceil_div(call.width, kSide), map = tile / of_map, s = tile % of_map * kSide;
  return {map * call.width + s, map * call.p.C * call.width + s * call.step, int(min_of(call.width - s, kSide))};
}

template <typename T>
PVK_INLINE Vec<T> at(const T* tile, int64_t c, int v) {
  return load(tile + c * kPositions<T> + v * kLanes<T>);
}

// The sum over the classes of body(class, register), in blocks.
template <typename T, typename Body>
PVK_INLINE void sum_over_classes(int64_t C, Vec<T> (&total)[kVectors], const Body& body) {
  for (int v = 0; v < kVectors; ++v) total[v] = Vec<T>{};
  for (int64_t begin = 0; begin < C; begin += kClassesOfBlock) {
    const int64_t end = min_of(begin + kClassesOfBlock, C);
    Vec<T> sum[kVectors] = {};
    for (int64_t c = begin; c < end; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += body(c, v);
    }
    for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
  }
}

// Labels of a tile, -1 where they are ignored, and the constants of their classes.
template <typename T>
struct Labels {
  using Int = decltype(Mask<T>{}[0] + 0);
  Mask<T> label[kVectors];
  Vec<T> scale[kVectors], weight[kVectors];
  bool has_wrong;  // a label that is no class

  PVK_INLINE Mask<T> is(int64_t c, int v) const { return label[v] == Mask<T>{} + Int(c); }

  template <typename scalar_t>
  PVK_INLINE Labels(const Call<scalar_t>& call, const Place& place) {
    typedef Int Narrow __attribute__((vector_size(sizeof(Int) * kLanes<double>)));
    alignas(64) Int labels[kPositions<T>];
    alignas(64) int64_t some[kPositions<T>];
    const int64_t* from = static_cast<const int64_t*>(call.p.target) + place.position;
    if (place.lanes < kPositions<T>) {
      for (int lane = 0; lane < kPositions<T>; ++lane)
        some[lane] = lane < place.lanes ? from[lane] : call.p.ignore_index;
      from = some;
    }
    Mask<double> wrong{};
    for (int lane = 0; lane < kPositions<T>; lane += kLanes<double>) {
      Mask<double> wide;
      std::memcpy(&wide, from + lane, sizeof(wide));
      const Mask<double> is_kept = wide != call.p.ignore_index, is_class = (wide >= 0) & (wide < call.p.C);
      const Narrow narrow = __builtin_convertvector((is_kept & is_class) ? wide : Mask<double>{} - 1, Narrow);
      std::memcpy(labels + lane, &narrow, sizeof(narrow));
      wrong |= is_kept & ~is_class;
    }
    has_wrong = any<double>(wrong);
    std::memcpy(label, labels, sizeof(label));
    if (call.p.weight == nullptr) {
      for (int v = 0; v < kVectors; ++v) {
        weight[v] = label[v] < 0 ? Vec<T>{} : splat(T(1));
        scale[v] = label[v] < 0 ? Vec<T>{} : splat(call.classes.scale[0]);
      }
      return;
    }
    alignas(64) T weights[kPositions<T>] = {}, scales[kPositions<T>] = {};
    for (int lane = 0; lane < place.lanes; ++lane) {
      if (labels[lane] < 0) continue;
      weights[lane] = call.classes.weight[labels[lane]];
      scales[lane] = call.classes.scale[labels[lane]];
    }
    std::memcpy(weight, weights, sizeof(weight));
    std::memcpy(scale, scales, sizeof(scale));
  }
};

// The logits of a tile. Where classes lie apart, those of the next are asked for: no hardware follows so many streams.
template <typename scalar_t, typename T>
PVK_INLINE void load_logits(const Call<scalar_t>& call, const Place& place, T* x) {
  const scalar_t* const source = call.logits(place.offset);
  if (call.step == 1) {
    constexpr int64_t kLine = 64 / sizeof(scalar_t);
    for (int64_t c = 0; c < call.p.C; ++c)
      for (int64_t i = 0; i < kPositions<T>; i += kLine)
        __builtin_prefetch(source + c * call.class_step + kPositions<T> + i);
  }
  load_tile(x, kPositions<T>, source, call.step, call.class_step, place.lanes, call.p.C);
}

template <typename scalar_t, typename T>
void tile_forward(Call<scalar_t>& call, const Place& place, T* x, T* t, WideSum<T>& loss_sum, WideSum<T>& weight_sum) {
  constexpr int kSide = kLanes<T>;
  const SoftmaxCrossEntropyParams& p = call.p;
  load_logits(call, place, x);
  Vec<T> max[kVectors], sum[kVectors], log[kVectors], loss[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) max[v] = at(x, 0, v);
  for (int64_t c = 1; c < p.C; ++c)
    for (int v = 0; v < kVectors; ++v) max[v] = larger_of<T>(max[v], at(x, c, v));
  sum_over_classes<T>(p.C, sum,
                      [&](int64_t c, int v) __attribute__((always_inline)) { return exp_of<T>(at(x, c, v) - max[v]); });
  for (int v = 0; v < kVectors; ++v) log[v] = log_of<T>(sum[v]);

  if (p.is_soft) {
    load_tile(t, kPositions<T>, call.probabilities(place.offset), call.step, call.class_step, place.lanes, p.C);
    sum_over_classes<T>(p.C, loss, [&](int64_t c, int v) __attribute__((always_inline)) {
      const Vec<T> wanted = fma(at(t, c, v), splat(call.classes.scale[c]), splat(call.classes.base[c]));
      return wanted * (log[v] - (at(x, c, v) - max[v]));
    });
  } else {
    const Labels<T> labels(call, place);
    if (labels.has_wrong) call.note_wrong_label(place.position);
    Vec<T> picked[kVectors] = {};
    for (int64_t c = 0; c < p.C; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) picked[v] = labels.is(c, v) ? at(x, c, v) : picked[v];
    }
    if (p.smoothing > 0) {
      sum_over_classes<T>(p.C, loss, [&](int64_t c, int v) __attribute__((always_inline)) {
        return call.classes.base[c] * (log[v] - (at(x, c, v) - max[v]));
      });
    }
    for (int v = 0; v < kVectors; ++v) {
      loss[v] += labels.scale[v] * (log[v] - (picked[v] - max[v]));
      loss[v] = labels.label[v] < 0 ? Vec<T>{} : loss[v];
      weight_sum.add(labels.weight[v]);
    }
  }
  for (int v = 0; v * kSide < place.lanes; ++v) {
    const int lanes = min_of(place.lanes - v * kSide, kSide);
    const int64_t position = place.position + v * kSide;
    store_lanes(call.max(position), max[v], lanes);
    store_lanes(call.log(position), log[v], lanes);
    if (p.reduction == Reduction::kNone) {
      call.store_loss(position, loss[v], lanes);
    } else {
      loss_sum.add(only<T>(loss[v], lanes));
    }
  }
}

// The tiles become those of the gradients.
template <typename scalar_t, typename T>
void tile_backward(const Call<scalar_t>& call, const Place& place, T* x, T* t) {
  constexpr int kSide = kLanes<T>;
  const SoftmaxCrossEntropyParams& p = call.p;
  const auto& classes = call.classes;
  load_logits(call, place, x);
  Vec<T> max[kVectors] = {}, log[kVectors] = {}, grad[kVectors] = {}, total[kVectors];
  for (int v = 0; v * kSide < place.lanes; ++v) {
    const int lanes = min_of(place.lanes - v * kSide, kSide);
    const int64_t position = place.position + v * kSide;
    max[v] = load_lanes(call.max(position), lanes);
    log[v] = load_lanes(call.log(position), lanes);
    grad[v] = call.grad(position, lanes);
  }
  const auto log_probability = [&](int64_t c, int v)
                                   __attribute__((always_inline)) { return (at(x, c, v) - max[v]) - log[v]; };
  if (p.is_soft) {
    const auto wanted = [&](int64_t c, int v) __attribute__((always_inline)) {
      return fma(at(t, c, v), splat(classes.scale[c]), splat(classes.base[c]));
    };
    load_tile(t, kPositions<T>, call.probabilities(place.offset), call.step, call.class_step, place.lanes, p.C);
    sum_over_classes<T>(p.C, total, wanted);
    for (int64_t c = 0; c < p.C; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t i = c * kPositions<T> + v * kSide;
        const Vec<T> log_p = log_probability(c, v), q = wanted(c, v);
        store(x + i, grad[v] * (exp_of<T>(log_p) * total[v] - q));
        store(t + i, grad[v] * -classes.scale[c] * log_p);
      }
    }
  } else {
    const Labels<T> labels(call, place);
    for (int v = 0; v < kVectors; ++v) total[v] = labels.scale[v] + call.classes.base_sum;
    for (int64_t c = 0; c < p.C; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> wanted = (labels.is(c, v) ? labels.scale[v] : Vec<T>{}) + classes.base[c];
        const Vec<T> by_logit = grad[v] * (exp_of<T>(log_probability(c, v)) * total[v] - wanted);
        store(x + c * kPositions<T> + v * kSide, labels.label[v] < 0 ? Vec<T>{} : by_logit);
      }
    }
  }
  if (p.grad_input != nullptr) {
    scalar_t* const target = static_cast<scalar_t*>(p.grad_input) + place.offset;
    store_tile(target, x, kPositions<T>, call.step, call.class_step, place.lanes, p.C);
  }
  if (p.grad_target != nullptr) {
    scalar_t* const target = static_cast<scalar_t*>(p.grad_target) + place.offset;
    store_tile(target, t, kPositions<T>, call.step, call.class_step, place.lanes, p.C);
  }
}

// ---- rows: [C], a lane a class ----

template <typename T>
PVK_INLINE T sum_of(const Vec<T> (&sum)[4]) {
  return sum_of_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <typename scalar_t, typename T>
void row_forward(Call<scalar_t>& call, int64_t position, WideSum<T>& loss_sum, WideSum<T>& weight_sum) {
  const SoftmaxCrossEntropyParams& p = call.p;
  const scalar_t* const x = call.logits(position * p.C);
  const scalar_t* const t = call.probabilities(position * p.C);
  const T *const scale = &call.classes.scale[0], *const base = &call.classes.base[0];
  Vec<T> largest[4], sum[4] = {};
  for (int v = 0; v < 4; ++v) largest[v] = splat(T(to_float(x[0])));
  for_row<T>(p.C, [&](int64_t i, int lanes, int v) __attribute__((always_inline)) {
    const Vec<T> value = load_lanes(x + i, lanes);
    const Vec<T> present = lanes == kLanes<T> ? value : first_lanes<T>(lanes) ? value : largest[v];
    largest[v] = larger_of<T>(largest[v], present);
  });
  const T max =
      largest_of_lanes<T>(larger_of<T>(larger_of<T>(largest[0], largest[1]), larger_of<T>(largest[2], largest[3])));
  for_row<T>(p.C, [&](int64_t i, int lanes, int v) __attribute__((always_inline)) {
    sum[v] += only<T>(exp_of<T>(load_lanes(x + i, lanes) - max), lanes);
  });
  const T log = log_of<T>(splat(sum_of<T>(sum)))[0];
  T loss = 0, weight = 0;
  const int64_t label = p.is_soft ? -1 : call.label(position);
  if (!p.is_soft && label < 0 && !call.is_ignored(position)) call.note_wrong_label(position);
  if (p.is_soft || (p.smoothing > 0 && label >= 0)) {
    for (int v = 0; v < 4; ++v) sum[v] = Vec<T>{};
    for_row<T>(p.C, [&](int64_t i, int lanes, int v) __attribute__((always_inline)) {
      Vec<T> wanted = load_lanes(base + i, lanes);
      if (p.is_soft) wanted = fma(load_lanes(t + i, lanes), load_lanes(scale + i, lanes), wanted);
      sum[v] += only<T>(wanted * (log - (load_lanes(x + i, lanes) - max)), lanes);
    });
    loss = sum_of<T>(sum);
  }
  if (label >= 0) {
    loss += scale[label] * (log - (T(to_float(x[label])) - max));
    weight = call.classes.weight[label];
  }
  *call.max(position) = max;
  *call.log(position) = log;
  if (p.reduction == Reduction::kNone) {
    call.store_loss(position, splat(loss), 1);
  } else {
    loss_sum.add(only<T>(splat(loss), 1));
    weight_sum.add(only<T>(splat(weight), 1));
  }
}

template <typename scalar_t>
void row_backward(const Call<scalar_t>& call, int64_t position) {
  using T = opmath_t<scalar_t>;
  const SoftmaxCrossEntropyParams& p = call.p;
  const scalar_t* const x = call.logits(position * p.C);
  const scalar_t* const t = call.probabilities(position * p.C);
  const T *const scale = &call.classes.scale[0], *const base = &call.classes.base[0];
  const T max = *call.max(position), log = *call.log(position), grad = call.grad(position, 1)[0];
  const auto log_probability = [&](int64_t i, int lanes)
                                   __attribute__((always_inline)) { return (load_lanes(x + i, lanes) - max) - log; };
  scalar_t* const by_logit = static_cast<scalar_t*>(p.grad_input) + (p.grad_input == nullptr ? 0 : position * p.C);
  if (!p.is_soft) {
    const int64_t label = call.label(position);
    if (label < 0) {
      return for_row<T>(p.C, [&](int64_t i, int lanes, int)
                                 __attribute__((always_inline)) { store_lanes(by_logit + i, Vec<T>{}, lanes); });
    }
    const T total = scale[label] + call.classes.base_sum;
    const bool is_smooth = p.smoothing > 0;
    for_row<T>(p.C, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      Vec<T> result = exp_of<T>(log_probability(i, lanes)) * total;
      if (is_smooth) result -= load_lanes(base + i, lanes);
      if (label - i >= 0 && label - i < kLanes<T>) result[label - i] -= scale[label];
      store_lanes(by_logit + i, result * grad, lanes);
    });
    return;
  }
  const auto wanted = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    return fma(load_lanes(t + i, lanes), load_lanes(scale + i, lanes), load_lanes(base + i, lanes));
  };
  Vec<T> sum[4] = {};
  for_row<T>(p.C, [&](int64_t i, int lanes, int v)
                      __attribute__((always_inline)) { sum[v] += only<T>(wanted(i, lanes), lanes); });
  const T total = sum_of<T>(sum);
  if (p.grad_input != nullptr) {
    for_row<T>(p.C, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      store_lanes(by_logit + i, grad * (exp_of<T>(log_probability(i, lanes)) * total - wanted(i, lanes)), lanes);
    });
  }
  if (p.grad_target != nullptr) {
    scalar_t* const by_target = static_cast<scalar_t*>(p.grad_target) + position * p.C;
    for_row<T>(p.C, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
      store_lanes(by_target + i, grad * -load_lanes(scale + i, lanes) * log_probability(i, lanes), lanes);
    });
  }
}

// ---- the whole ----

template <typename scalar_t>
int64_t forward_typed(const SoftmaxCrossEntropyParams& p) {
  using T = opmath_t<scalar_t>;
  Call<scalar_t> call(p);
  const int64_t of_part = max_of(ceil_div(call.tiles, kParts), call.tiles_of_part);
  const int64_t parts = ceil_div(call.tiles, of_part);
  parallel_for(parts, 1, [&](int64_t first, int64_t last) {
    const int64_t tile = call.in_rows ? 0 : p.C * kPositions<T>;
    Buffer<T> logits(tile), probabilities(p.is_soft ? tile : 0);
    for (int64_t part = first; part < last; ++part) {
      WideSum<T> loss, weight;
      for (int64_t i = part * of_part; i < min_of((part + 1) * of_part, call.tiles); ++i) {
        if (call.in_rows) {
          row_forward(call, i, loss, weight);
        } else {
          tile_forward(call, place_of(call, i), logits.data(), probabilities.data(), loss, weight);
        }
      }
      p.partials[2 * part] = loss.value();
      p.partials[2 * part + 1] = weight.value();
    }
  });
  double loss = 0, weight = 0;
  for (int64_t part = 0; part < parts; ++part) {
    loss += p.partials[2 * part];
    weight += p.partials[2 * part + 1];
  }
  const double total = p.is_soft ? double(call.positions) : weight;
  *call.total() = T(total);
  if (p.reduction != Reduction::kNone)
    call.store_loss(0, splat(T(p.reduction == Reduction::kMean ? loss / total : loss)), 1);
  return call.wrong;
}

template <typename scalar_t>
void backward_typed(const SoftmaxCrossEntropyParams& p) {
  using T = opmath_t<scalar_t>;
  const Call<scalar_t> call(p);
  parallel_for(call.tiles, call.tiles_of_part, [&](int64_t begin, int64_t end) {
    const int64_t tile = call.in_rows ? 0 : p.C * kPositions<T>;
    Buffer<T> logits(tile), probabilities(p.is_soft ? tile : 0);
    for (int64_t i = begin; i < end; ++i) {
      if (call.in_rows) {
        row_backward(call, i);
      } else {
        tile_backward(call, place_of(call, i), logits.data(), probabilities.data());
      }
    }
  });
}

}  // namespace

int64_t forward(const SoftmaxCrossEntropyParams& p) {
  int64_t wrong = -1;
  dispatch_floating(p.dtype, [&](auto scalar) { wrong = forward_typed<decltype(scalar)>(p); });
  return wrong;
}

void backward(const SoftmaxCrossEntropyParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) { backward_typed<decltype(scalar)>(p); });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(int64_t, forward, SoftmaxCrossEntropyParams)
PVK_CPU_ENTRY(void, backward, SoftmaxCrossEntropyParams)

}  // namespace pvk::softmax_cross_entropy
