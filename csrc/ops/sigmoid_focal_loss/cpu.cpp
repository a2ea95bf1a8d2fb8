// Sigmoid focal loss on the CPU: one pass forward, one backward, a register of elements at a time.
//
// A reduction sums parts whose borders depend on the count alone, and then the parts in order: the same bits for any
// number of threads.
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/simd_math.h"
#include "ops/sigmoid_focal_loss/sigmoid_focal_loss.h"

namespace pvk::sigmoid_focal_loss {
namespace PVK_ISA {
namespace {

using namespace pvk::PVK_ISA;

constexpr int64_t kPart = 8192;  // elements that a task handles at least

// Registers whose sum is kept in opmath before it goes to a Total.
template <typename T>
constexpr int kGroup = sizeof(T) == 8 ? 8 : 32;

// A sum in double that keeps what each addition loses (Neumaier).
struct Total {
  double sum = 0, lost = 0;

  PVK_INLINE void add(double value) {
    const double next = sum + value;
    const bool is_larger = __builtin_fabs(sum) >= __builtin_fabs(value);
    lost += is_larger ? (sum - next) + value : (value - next) + sum;
    sum = next;
  }
  // An infinite or NaN sum has lost nothing that counts.
  PVK_INLINE double value() const { return sum - sum == 0 ? sum + lost : sum; }
};

enum class PowerKind { kSquare, kHalves, kAny };

// missed^gamma, and gamma * missed^(gamma - 1).
template <PowerKind kind, typename T>
struct Power {
  T gamma;
  int halves;  // 2 gamma, for kHalves

  PVK_INLINE void apply(Vec<T> missed, Vec<T>& power, Vec<T>& less) const {
    if constexpr (kind == PowerKind::kSquare) {
      power = missed * missed;
      less = missed + missed;
    } else if constexpr (kind == PowerKind::kHalves) {
      const Vec<T> root = sqrt_of(missed);
      if (halves == 0) {
        power = splat(T(1));
        less = Vec<T>{};
      } else if (halves == 1) {
        power = root;
        less = missed == T(0) ? Vec<T>{} : gamma / root;
      } else {
        Vec<T> product = halves % 2 ? root : splat(T(1)), square = missed;
        for (int n = halves / 2 - 1; n > 0; n /= 2) {
          if (n % 2) product *= square;
          square *= square;
        }
        power = product * missed;
        less = product * gamma;
      }
    } else {
      power = exp_of<T>(log_of<T>(missed) * gamma);
      less = missed == T(0) ? Vec<T>{} : power / missed * gamma;
    }
  }
};

template <typename T>
PVK_INLINE FocalTerms<Vec<T>, T> terms_of(Vec<T> x, Vec<T> target, T alpha) {
  const Vec<T> magnitude = abs_of<T>(x), e = exp_of<T>(-magnitude);
  return {x, target, magnitude, e, log1p_of<T>(e), alpha};
}

// The registers of [begin, end): body(offset, lanes) with the last one perhaps not whole.
template <typename T, typename Body>
PVK_INLINE void for_registers(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes<T> <= end; i += kLanes<T>) body(i, kLanes<T>);
  if (i < end) body(i, int(end - i));
}

template <typename T, typename scalar_t>
PVK_INLINE Vec<T> load_some(const scalar_t* source, int lanes) {
  scalar_t some[kLanes<T>] = {};
  if (lanes < kLanes<T>) {
    for (int lane = 0; lane < lanes; ++lane) some[lane] = source[lane];
    source = some;
  }
  return load(source);
}

template <typename T, typename scalar_t>
PVK_INLINE void store_some(scalar_t* target, Vec<T> value, int lanes) {
  if (lanes == kLanes<T>) return store(target, value);
  for (int lane = 0; lane < lanes; ++lane) target[lane] = from_float<scalar_t>(value[lane]);
}

template <typename scalar_t, PowerKind kind, typename T>
void forward_typed(const SigmoidFocalLossParams& p, const Power<kind, T>& power_of) {
  const scalar_t* inputs = static_cast<const scalar_t*>(p.inputs);
  const scalar_t* targets = static_cast<const scalar_t*>(p.targets);
  scalar_t* loss = static_cast<scalar_t*>(p.loss);
  const T alpha = T(p.alpha);
  const auto loss_at = [&](int64_t i, int lanes) {
    const auto terms = terms_of<T>(load_some<T>(inputs + i, lanes), load_some<T>(targets + i, lanes), alpha);
    Vec<T> power, less;
    power_of.apply(terms.missed, power, less);
    return terms.loss(power);
  };
  if (p.reduction == Reduction::kNone) {
    return parallel_for(p.count, kPart, [&](int64_t begin, int64_t end) {
      for_registers<T>(begin, end, [&](int64_t i, int lanes) { store_some<T>(loss + i, loss_at(i, lanes), lanes); });
    });
  }
  constexpr int64_t kGroupElements = kGroup<T> * kLanes<T>;
  const int64_t part = max_of(ceil_div(p.count, kPartials), kPart), parts = ceil_div(p.count, part);
  parallel_for(parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t stop = min_of((index + 1) * part, p.count);
      Total total;
      for (int64_t begin = index * part; begin < stop; begin += kGroupElements) {
        Vec<T> sum{};
        for_registers<T>(begin, min_of(begin + kGroupElements, stop), [&](int64_t i, int lanes) {
          const Vec<T> value = loss_at(i, lanes);
          if (lanes == kLanes<T>) {
            sum += value;
          } else {
            for (int lane = 0; lane < lanes; ++lane) sum[lane] += value[lane];
          }
        });
        double group = 0;
        for (int lane = 0; lane < kLanes<T>; ++lane) group += double(sum[lane]);
        total.add(group);
      }
      p.partials[index] = total.value();
    }
  });
  Total total;
  for (int64_t i = 0; i < parts; ++i) total.add(p.partials[i]);
  const double sum = total.value();
  *loss = from_float<scalar_t>(T(p.reduction == Reduction::kMean ? sum / double(p.count) : sum));
}

template <typename scalar_t, PowerKind kind, typename T>
void backward_typed(const SigmoidFocalLossParams& p, const Power<kind, T>& power_of) {
  const scalar_t* inputs = static_cast<const scalar_t*>(p.inputs);
  const scalar_t* targets = static_cast<const scalar_t*>(p.targets);
  const scalar_t* grad = static_cast<const scalar_t*>(p.grad);
  scalar_t* grad_inputs = static_cast<scalar_t*>(p.grad_inputs);
  scalar_t* grad_targets = static_cast<scalar_t*>(p.grad_targets);
  const T alpha = T(p.alpha);
  const T scale = p.reduction == Reduction::kMean ? T(1.0 / double(p.count)) : T(1);
  parallel_for(p.count, kPart, [&](int64_t begin, int64_t end) {
    for_registers<T>(begin, end, [&](int64_t i, int lanes) {
      const auto terms = terms_of<T>(load_some<T>(inputs + i, lanes), load_some<T>(targets + i, lanes), alpha);
      const Vec<T> upstream =
          p.grad_is_single ? splat(T(to_float(*grad)) * scale) : load_some<T>(grad + i, lanes) * scale;
      Vec<T> power, less;
      power_of.apply(terms.missed, power, less);
      if (grad_inputs != nullptr) store_some<T>(grad_inputs + i, upstream * terms.by_input(power, less), lanes);
      if (grad_targets != nullptr)
        store_some<T>(grad_targets + i, upstream * terms.by_target(power, less, alpha), lanes);
    });
  });
}

// body(scalar_t{}, Power) for the dtype and gamma of p.
template <typename Body>
void dispatch_power(const SigmoidFocalLossParams& p, const Body& body) {
  const int halves = half_powers(p.gamma);
  dispatch_floating(p.dtype, [&](auto scalar) {
    using T = opmath_t<decltype(scalar)>;
    if (halves == 4) return body(scalar, Power<PowerKind::kSquare, T>{T(p.gamma), halves});
    if (halves >= 0) return body(scalar, Power<PowerKind::kHalves, T>{T(p.gamma), halves});
    body(scalar, Power<PowerKind::kAny, T>{T(p.gamma), halves});
  });
}

}  // namespace

void forward(const SigmoidFocalLossParams& p) {
  dispatch_power(p, [&](auto scalar, const auto& power) { forward_typed<decltype(scalar)>(p, power); });
}

void backward(const SigmoidFocalLossParams& p) {
  dispatch_power(p, [&](auto scalar, const auto& power) { backward_typed<decltype(scalar)>(p, power); });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, SigmoidFocalLossParams)
PVK_CPU_ENTRY(void, backward, SigmoidFocalLossParams)

}  // namespace pvk::sigmoid_focal_loss
